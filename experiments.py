"""The papers' claims in miniature, each by one command; runs that are done are not done again.

python experiments.py framework     the nine configurations of arXiv 2410.14442, 2x and 4x smaller cache
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import data
from cli import Parser, UserError, duration, replace_file, run
from kv_router import Plan
from model import GPT
from sweep import stderr
from train import load_run, window_losses

NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]


def train_all(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train every run (name -> flags) into folder/name; a finished one is skipped, a stopped one resumed."""

    def finished(name: str) -> Path:
        return folder / name / "finished.json"  # holds the flags it was finished with

    todo = [n for n in runs if not finished(n).exists() or finished(n).read_text() != json.dumps(runs[n])]
    began = time.monotonic()
    for done, name in enumerate(todo):
        left = (
            f", about {duration((time.monotonic() - began) / done * (len(todo) - done))} left" if done else ""
        )
        print(f"[{done + 1} of {len(todo)}{left}] {name}", flush=True)
        init = "resume" if any((folder / name).glob("*.pt")) else "scratch"
        command = [
            sys.executable,
            "train.py",
            *runs[name],
            f"--out_dir={folder / name}",
            f"--init_from={init}",
        ]
        # In a process group of its own: a Ctrl-C reaches it through us, once, and it has time to save.
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as child:
            output = None
            while output is None:
                try:
                    output, _ = child.communicate()
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)
        if lines := output.splitlines():
            print("    " + lines[-1], flush=True)
        if child.returncode:
            sys.exit(abs(child.returncode))  # train.py has said why
        replace_file(finished(name), json.dumps(runs[name]).encode())


def interleaved(
    models: dict[str, GPT], measure: Callable[[GPT], float], repeats: int = 7
) -> dict[str, float]:
    """The median of `measure` for every model, all taking turns, after one warm-up: machines are noisy."""
    values = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            value = measure(model)
            values[name] += [value] if repeat else []
    return {name: median(v) for name, v in values.items()}


def framework(folder: Path, seeds: int, max_iters: int) -> None:
    """The main table of arXiv 2410.14442 in miniature: quality and speed of the nine configurations, each
    trained on the same tokens. Some of them are one and the same plan at 8 layers and are trained once."""
    n_layer = 8
    shrink = {"full": 1} | {f"{name}:{n_layer // x}": x for x in (2, 4) for name in NINE}
    first = {}  # plan -> the first configuration that means it
    for spec in shrink:
        first.setdefault(Plan.parse(spec, n_layer), spec)
    length = [f"--max_iters={max_iters}", f"--warmup_iters={max_iters // 10}", f"--eval_interval={max_iters}"]
    names = {
        (spec, seed): f"seed{seed}/{spec.replace(':', '-')}"
        for seed in range(seeds)
        for spec in first.values()
    }
    train_all(
        folder,
        {
            name: ["config/demo.toml", f"--plan={spec}", f"--seed={seed}", *length]
            for (spec, seed), name in names.items()
        },
    )

    losses, models = {spec: [] for spec in first.values()}, {}
    for (spec, _), name in names.items():
        models[spec], config = load_run(folder / name)
        tokens = data.Tokens(Path(config.data_dir) / config.dataset, "val", config.block_size)
        losses[spec].append(window_losses(models[spec], tokens, 128, 16))
    x, y = tokens.windows(range(0, 4 * config.block_size, config.block_size))
    prompt = x[:1, :192]

    def train_step(model: GPT) -> float:
        began = time.perf_counter()
        model(x, y)[1].backward()
        return time.perf_counter() - began

    def ttft(model: GPT) -> float:
        began = time.perf_counter()
        next(model.stream(prompt, 1, temperature=0))
        return time.perf_counter() - began

    def tpot(model: GPT) -> float:
        times = [time.perf_counter() for _ in model.stream(prompt, 33, temperature=0)]
        return (times[-1] - times[0]) / 32

    step_s, ttft_s, tpot_s = (interleaved(models, measure) for measure in (train_step, ttft, tpot))
    rows = []
    for spec, x_smaller in shrink.items():
        plan = Plan.parse(spec, n_layer)
        same = first[plan]
        rows.append({"plan": spec, "shrink": x_smaller, "same_as": same, "cyclic": plan.cyclic})
        by_seed = [float(windows.mean()) for windows in losses[same]]
        above = sum(own - full for own, full in zip(losses[same], losses["full"])) / seeds
        rows[-1] |= {"cache_ratio": plan.cache_ratio, "loss_by_seed": by_seed, "loss": mean(by_seed)}
        rows[-1] |= {"delta": float(above.mean()), "delta_stderr": stderr(above)}
        rows[-1] |= {"train_step_ms": 1e3 * step_s[same], "ttft_ms": 1e3 * ttft_s[same]}
        rows[-1] |= {"tokens_per_s": 1 / tpot_s[same]}
    columns = ["plan", "cache", "loss", "above full", "training step", "first token", "decode", ""]
    text = f"""{seeds} seed(s), {max_iters} steps of 1,024 tokens. Loss in nats/token, mean of the seeds
(smallest to largest); above full: paired over 128 held-out windows, with the standard error over windows.
Times are medians of 7 interleaved repeats: forward and backward of one batch, first token of a prompt of 192
tokens, and greedy decoding of 32 more.

| {" | ".join(columns)} |
{"|---" * len(columns)}|
"""
    for r in rows:
        low, high = min(r["loss_by_seed"]), max(r["loss_by_seed"])
        spread = f" ({low:.3f} to {high:.3f})" if seeds > 1 else ""
        above = f"{r['delta']:+.3f} +- {r['delta_stderr']:.3f}" if r["shrink"] > 1 else ""
        note = "cyclic" if r["cyclic"] else ""
        note = note if r["same_as"] == r["plan"] else f"the same plan as `{r['same_as']}`"
        cells = [f"`{r['plan']}`", f"{r['cache_ratio']:.0%}", f"{r['loss']:.3f}{spread}", above]
        cells += [
            f"{r['train_step_ms']:.0f} ms",
            f"{r['ttft_ms']:.0f} ms",
            f"{r['tokens_per_s']:.0f}/s",
            note,
        ]
        text += f"| {' | '.join(cells)} |\n"
    print(text)
    (folder / "framework.md").write_text(text)
    (folder / "framework.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_framework(rows, folder / "framework.png")
    print(f"wrote framework.md, framework.jsonl and framework.png to {folder}")


def draw_framework(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 4), dpi=150, sharey=True)
    labels = {"loss": "held-out loss, nats per token", "train_step_ms": "training step, ms"}
    for ax, (key, label) in zip(axes, labels.items()):
        for x, marker, fill in ((2, "o", "black"), (4, "s", "white")):
            points = [(r[key], NINE.index(r["plan"].split(":")[0])) for r in rows if r["shrink"] == x]
            ax.plot(*zip(*points), marker, mec="black", mfc=fill, label=f"cache {x}x smaller")
        ax.axvline(rows[0][key], color="black", linestyle="--", linewidth=1, label="full cache")
        ax.set_xlabel(label)
        ax.grid(alpha=0.25)
    axes[0].set_yticks(range(9), NINE)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8)
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
