"""The papers' claims in miniature, each by one command; runs that are done are not done again.

python experiments.py framework        the nine configurations of arXiv 2410.14442 at 2x and 4x smaller cache
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
from cli import Parser, UserError, duration, run
from kv_router import Plan
from model import GPT
from train import load_run, window_losses

NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]


def train_all(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train every run (name -> flags) into folder/name; a finished one is skipped, a stopped one resumed."""
    began = time.time()
    todo = {name: flags for name, flags in runs.items() if finished(folder / name) != flags}
    for done, (name, flags) in enumerate(todo.items()):
        left = f", about {duration((time.time() - began) / done * (len(todo) - done))} left" if done else ""
        print(f"[{done + 1} of {len(todo)}{left}] {name}", flush=True)
        init = "resume" if (folder / name / "ckpt.pt").exists() else "scratch"
        command = [sys.executable, "train.py", *flags, f"--out_dir={folder / name}", f"--init_from={init}"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(result.returncode)  # train.py has said why
        print("    " + result.stdout.splitlines()[-1], flush=True)
        (folder / name / "finished.json").write_text(json.dumps(flags))


def finished(run_folder: Path) -> list[str] | None:
    """The flags of a run that was trained to its end."""
    record = run_folder / "finished.json"
    return json.loads(record.read_text()) if record.exists() else None


@torch.no_grad()
def time_generation(models: dict[str, GPT], prompt: torch.Tensor, new: int, repeats: int) -> dict[str, tuple]:
    """Median seconds to the first token and tokens/s after it, every model in turn in each repeat."""
    first, speed = {name: [] for name in models}, {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times = [time.perf_counter()]
            times += [time.perf_counter() for _ in model.stream(prompt, new, temperature=0)]
            first[name].append(times[1] - times[0])
            speed[name].append((new - 1) / (times[-1] - times[1]))
    return {name: (statistics.median(first[name]), statistics.median(speed[name])) for name in models}


def framework(folder: Path, seeds: int, max_iters: int) -> None:
    """The main table of arXiv 2410.14442 in miniature: quality and speed of the nine configurations, trained
    each on the same tokens. Several of them are one and the same plan at 8 layers; those are trained once."""
    n_layer = 8
    shrink = {"full": 1} | {f"{name}:{n_layer // x}": x for x in (2, 4) for name in NINE}
    name_of = {}  # plan -> the first configuration that means it
    for spec in shrink:
        name_of.setdefault(Plan.parse(spec, n_layer), spec)
    common = [f"--max_iters={max_iters}", f"--warmup_iters={max_iters // 10}", f"--eval_interval={max_iters}"]
    runs = {
        f"seed{seed}/{spec.replace(':', '-')}": [
            "config/demo.toml",
            f"--plan={spec}",
            f"--seed={seed}",
            *common,
        ]
        for seed in range(seeds)
        for spec in name_of.values()
    }
    train_all(folder, runs)

    losses = {spec: [] for spec in name_of.values()}
    seconds = {spec: [] for spec in name_of.values()}
    for seed in range(seeds):
        folders = {spec: folder / f"seed{seed}" / spec.replace(":", "-") for spec in name_of.values()}
        models = {}
        for spec, path in folders.items():
            models[spec], config = load_run(path)
            tokens = data.Tokens(Path(config.data_dir) / config.dataset, "val", config.block_size)
            losses[spec].append(float(window_losses(models[spec], tokens, 128, 16).mean()))
            seconds[spec].append(json.loads((path / "log.jsonl").read_text().splitlines()[-1])["time"])
    prompt = next(tokens.held_out(1, 1))[0][:, :192]
    speeds = time_generation(models, prompt, new=33, repeats=7)
    rows = []
    for spec, x in shrink.items():
        plan = Plan.parse(spec, n_layer)
        same = name_of[plan]
        loss, first, speed = losses[same], *speeds[same]
        rows.append(
            {
                "plan": spec,
                "shrink": x,
                "same_as": same,
                "cache_ratio": plan.cache_ratio,
                "cyclic": plan.cyclic,
                "seeds": seeds,
                "loss": statistics.mean(loss),
                "spread": max(loss) - min(loss),
                "train_seconds": statistics.mean(seconds[same]),
                "ttft_ms": 1e3 * first,
                "tokens_per_s": speed,
            }  # fmt: skip
        )
    lines = [
        f"{seeds} seed(s), {max_iters} steps of 1,024 tokens; loss in nats/token on 128 held-out windows "
        "(spread: largest less smallest seed); prompt of 192 tokens, medians of 7 interleaved repeats.",
        "",
        "| plan | cache | loss | spread | training | first token | decode | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        note = "" if r["same_as"] == r["plan"] else f"the same plan as `{r['same_as']}`"
        lines.append(
            f"| `{r['plan']}` | {r['cache_ratio']:.0%} | {r['loss']:.3f} | {r['spread']:.3f} | "
            f"{r['train_seconds']:.0f} s | {r['ttft_ms']:.0f} ms | {r['tokens_per_s']:.0f}/s | "
            f"{note or 'cyclic' * r['cyclic']} |"
        )
    print("\n".join(lines))
    (folder / "framework.md").write_text("\n".join(lines) + "\n")
    (folder / "framework.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_framework(rows, folder / "framework.png")
    print(f"wrote framework.md, framework.jsonl and framework.png to {folder}")


def draw_framework(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 4), dpi=150, sharey=True)
    for ax, key, label in (
        (axes[0], "loss", "held-out loss, nats per token"),
        (axes[1], "train_seconds", "training, seconds"),
    ):
        for x, marker, fill in ((2, "o", "black"), (4, "s", "white")):
            points = [(r[key], NINE.index(r["plan"].split(":")[0])) for r in rows if r["shrink"] == x]
            ax.plot(*zip(*points), marker, mec="black", mfc=fill, label=f"cache {x}x smaller")
        ax.axvline(rows[0][key], color="black", linestyle="--", linewidth=1, label="full cache")
        ax.set_xlabel(label)
        ax.grid(alpha=0.25)
    axes[0].set_yticks(range(9), NINE)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def main():
    parser = Parser(__doc__)
    parser.add_argument("experiment", choices=["framework"], help="which one to run")
    parser.add_argument("--out_dir", default="out", help="results go to OUT_DIR/EXPERIMENT [out]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind [1]")
    parser.add_argument("--max_iters", type=int, default=400, help="training steps per run [400]")
    args = parser.parse_args()
    if args.seeds < 1 or args.max_iters < 10:
        raise UserError("--seeds must be 1 or more and --max_iters 10 or more")
    framework(Path(args.out_dir) / args.experiment, args.seeds, args.max_iters)


if __name__ == "__main__":
    run(main)
