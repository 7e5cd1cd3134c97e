"""Everything that only a GPU can tell, in one command, with the Python that is there: nothing is installed or
downloaded. Each step has a time limit and a log, and the next one runs whatever became of it. The page at the
end, out/gpu/report.md, is meant to be pasted into BENCHMARKS.md.

python -m lab.gpu                          # all stages
python -m lab.gpu --stages decode train    # some, or some again; the page keeps what the others printed

On a CPU the same steps run at small sizes, which proves the command and the page.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from support import cli
from support.cli import Parser, UserError, duration, read_json, replace_file, user_path, write_lines
from support.devices import device_name, pick_device
from support.runs import git_commit

import torch

ROOT = Path(__file__).parent.parent
# Stage -> step -> limit in seconds, command, and what a CPU has in place of some of its flags. A stage takes
# under four minutes in all.
SHAPE = "--n_layer 4 --n_embd 64 --n_head 4 --n_kv_head 2 --repeats 1 --no_compile"
BENCH = f"{SHAPE} --dtype float32 --prompts 32 64 --new_tokens 4 --memory_gb 0.01"
TINY = "--n_layer=2 --n_embd=32 --block_size=64 --batch_size=4 --compile=false --eval_iters=1"
TRAIN = "train.py config/small.toml --dataset=python --max_iters=120 --eval_interval=120 --log_interval=20"
STAGES = {
    "tests": {"tests": (200, "-m pytest -q -p no:cacheprovider -m gpu tests", "")},
    "decode": {
        "decode": (220, "-m lab.bench --dtype bfloat16 --prompts 64 8192 --memory_gb 8 --save_dir {}", BENCH)
    },
    "long": {
        "long": (
            220,
            "-m lab.bench --dtype bfloat16 --plans full fusedkv cla:4 --prompts 32768 --repeats 2 "
            "--memory_gb 8 --save_dir {}/long",
            BENCH,
        )
    },
    "train": {
        "train": (
            220,
            "-m lab.bench --train --config config/gpt2.toml --vocab_size 50304 --repeats 8 --save_dir {}",
            f"{SHAPE} --config config/demo.toml --vocab_size 512",
        )
    },
    "runs": {
        "normal": (70, f"{TRAIN} --out_dir={{}}/normal", f"{TINY} --max_iters=4"),
        "routed": (70, f"{TRAIN} --router_p=0.5 --out_dir={{}}/routed", f"{TINY} --max_iters=4"),
        "sweep": (40, "sweep.py --out_dir {0}/normal {0}/routed", "--windows 4"),
        "sample": (
            50,
            "sample.py --out_dir {}/routed --compile --plan full --plan cla:2 --max_new_tokens 64",
            "--max_new_tokens 4",
        ),
    },
}
SHOWN = 30  # lines of a step's output on the page


def take(name: str, limit: int, command: str, out: Path) -> dict:
    """Run a step; its output goes into a log. Returns what became of it."""
    # Files of the repository by their full paths, since this can be started anywhere.
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in shlex.split(command)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with open(out / f"{name}.log", "wb") as log:
        try:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "timeout": limit}
            status = subprocess.run([sys.executable, *words], **options).returncode
        except subprocess.TimeoutExpired:
            status = None
    return {"step": name, "command": command, "status": status, "seconds": time.monotonic() - began}


def machine(device: str) -> str:
    """Card, driver, torch, Python and the commit of this source, in a line."""
    driver = ""
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        driver = ", driver and memory " + subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}, commit {git_commit()}"
    return f"{device_name(device)}{driver}, {versions}"


def report(rows: list[dict], out: Path, title: str) -> str:
    """The page: what became of every step, and the end of what it printed."""
    lines = [f"## {title}", "", "| step | result | time |", "|---|---|---|"]
    for row in rows:
        result = {0: "done", None: "**over its limit**"}.get(row["status"], f"**status {row['status']}**")
        lines.append(f"| {row['step']} | {result} | {duration(row['seconds'])} |")
    for row in rows:
        printed = (out / f"{row['step']}.log").read_text(encoding="utf-8", errors="replace")
        shown = [line.rpartition("\r")[2] for line in printed.splitlines()[-SHOWN:]]  # no progress bars
        lines += ["", f"`python {row['command']}`", "", "```", *shown, "```"]
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="[all, in this order]")
    add("--out_dir", type=user_path, default="out/gpu", help="logs, results and report.md [out/gpu]")
    add("--device", default="auto", help="cuda, cpu [auto]")
    args = parser.parse_args()
    device, out = pick_device(args.device), Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    title, results = machine(device), out / "steps.jsonl"
    rows = read_json(results, "remove it", lines=True) if results.exists() else []
    done = {row["step"]: row for row in rows}
    for stage in args.stages:
        for name, (limit, command, small) in STAGES[stage].items():
            command = command.format(args.out_dir)
            if not device.startswith("cuda"):
                command, limit = f"{command} {small}".strip(), 5 * limit
            print(f"{stage}, {name}, at most {duration(limit)}: python {command}", flush=True)
            done[name] = take(name, limit, command, out)
            print(f"  status {done[name]['status']}, {duration(done[name]['seconds'])}", flush=True)
            write_lines(done.values(), results)  # the page is there whatever ends this program
            replace_file(out / "report.md", report(list(done.values()), out, title).encode())
    print(f"wrote {out / 'report.md'}")
    if failed := [row["step"] for row in done.values() if row["status"] != 0]:
        raise UserError(f"{', '.join(failed)} failed; see the logs in {out}, then --stages again")


if __name__ == "__main__":
    cli.run(main)
