"""The nine configurations of the unified framework at half and a quarter of the cache: quality and speed."""

import time
from statistics import median

import numpy as np

from kv_router import Plan
from lab.studies.report import FRAMEWORK, Claim, Section, markdown, mean_std
from lab.studies.workbench import Workbench, seeded
from model import GPT
from plots import picture

NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]
TURNS = 7


def prompt_and_answer(block_size: int) -> tuple[int, int]:
    """How many tokens of a window are a prompt, and how many are decoded."""
    n = min(192, block_size * 3 // 4)
    return n, min(32, block_size - n - 1)


def measure_times(bench: Workbench, runs: dict[str, str]) -> np.ndarray:
    """Milliseconds of a training step, the first token and a further one, (runs, 3), of models that take
    turns."""
    models = {spec: bench.load(run)[0] for spec, run in runs.items()}
    device = models["full"].embed.weight.device
    _, tokens = bench.load(runs["full"])
    x, y = (t.to(device) for t in next(tokens.held_out(4, 4)))
    n_prompt, n_answer = prompt_and_answer(tokens.block_size)

    def measure(model: GPT) -> list[float]:
        times = [time.perf_counter()]
        model(x, y)[1].backward()
        float(model.embed.weight.grad[0, 0])  # waits for a GPU
        times.append(time.perf_counter())
        for token in model.stream(x[:1, :n_prompt], 1 + n_answer, temperature=0):
            token.item()
            times.append(time.perf_counter())
        step, ttft = np.diff(times)[:2]
        return [1e3 * t for t in (step, ttft, (times[-1] - times[2]) / (len(times) - 3))]

    turns = [[measure(model) for model in models.values()] for _ in range(1 + TURNS)][1:]
    return np.median(turns, axis=0)


def draw(bench: Workbench, losses: dict[str, np.ndarray], steps: dict[str, float]) -> None:
    """The losses of every configuration, with their standard deviation over seeds, and its training step."""
    n = bench.n_layer
    with picture(bench.pictures / "framework.png", columns=2, sharey=True) as axes:
        for x, marker, fill in ((2, "o", "black"), (4, "s", "white")):
            specs = [f"{name}:{n // x}" for name in NINE]
            look = {"marker": marker, "color": "black", "mfc": fill, "ls": "", "label": f"cache {x}x smaller"}
            rows = np.arange(9) + (x - 3) / 8  # the two marks of a row just above and below its line
            means = [losses[spec].mean() for spec in specs]
            deviations = [losses[spec].std(ddof=1) for spec in specs]
            axes[0].errorbar(means, rows, xerr=deviations, **look)
            axes[1].plot([steps[spec] for spec in specs], rows, **look)
        for ax, full in zip(axes, (losses["full"].mean(), steps["full"])):
            ax.axvline(full, color="black", linestyle="--", linewidth=1, label="full cache")
        axes[0].set(xlabel="held-out loss, nats per token", yticks=range(9), yticklabels=NINE)
        axes[1].set(xlabel="training step, ms")
        axes[0].invert_yaxis()


def study(bench: Workbench) -> Section:
    n = bench.n_layer
    shrink = {"full": 1} | {f"{name}:{n // x}": x for x in (2, 4) for name in NINE}
    first = {}  # plan -> the first configuration that means it: some are one and the same
    for spec in shrink:
        first.setdefault(Plan.parse(spec, n), spec)
    settings = {spec: "" if spec == "full" else f"--plan={spec}" for spec in first.values()}
    bench.train(run for s in settings.values() for run in seeded(s))
    timed = {spec: seeded(s)[0] for spec, s in settings.items()}
    measured = bench.measured(timed["full"], "times", lambda: measure_times(bench, timed).flat)
    times = dict(zip(timed, measured.reshape(-1, 3)))

    rows, losses = [], {}
    full = bench.losses("")
    for spec, x in shrink.items():
        plan = Plan.parse(spec, n)
        same = first[plan]
        losses[spec], (step, ttft, tpot) = bench.losses(settings[same]), times[same]
        above = mean_std(losses[spec] - full) if x > 1 else ""
        note = ("cyclic" if plan.cyclic else "") if same == spec else f"the same plan as `{same}`"
        row = [f"`{spec}`", f"{plan.cache_ratio:.0%}", mean_std(losses[spec]), above]
        rows.append([*row, f"{step:.0f} ms", f"{ttft:.0f} ms", f"{1e3 / tpot:.0f}/s", note])
    draw(bench, losses, {spec: times[first[Plan.parse(spec, n)]][0] for spec in shrink})
    claims = []
    for name in NINE:  # configurations that are the plan of an earlier one are not counted again
        if (spec := f"{name}:{n // 2}") in settings:
            text = f"{name} with half the cache is within 1% of the full one"
            claims.append(Claim(FRAMEWORK, text, 1.01 * full - losses[spec]))
    for name in NINE:
        kind, target = name.split("-")
        if target != "bottom" and (spec := f"{name}:{n // 4}") in settings:
            text = f"With a quarter of the cache {kind} is better with {target} than with bottom"
            claims.append(Claim(FRAMEWORK, text, losses[f"{kind}-bottom:{n // 4}"] - losses[spec]))
    faster = median(times["full"][2] / t[2] - 1 for spec, t in times.items() if spec != "full")
    n_prompt, n_answer = prompt_and_answer(bench.load(timed["full"])[1].block_size)
    text = f"""Training with the passes that `train.py` has by default. Above full: paired by seed. Times are
medians of {TURNS} repeats, all models taking turns, in float32 and uncompiled: forward and backward of one
batch, first token of a prompt of {n_prompt} tokens, greedy decoding of {n_answer} more. The median
configuration decodes {faster:+.0%} tokens/s.

"""
    header = ["plan", "cache", "loss", "above full", "training step", "first token", "decode", ""]
    text += markdown(header, rows) + "\n![loss and training time](PICTURES/framework.png)\n"
    ranges = []
    for x in (2, 4):
        above = [(losses[f"{name}:{n // x}"] - full).mean() for name in NINE]
        ranges.append(f"{min(above):+.3f} to {max(above):+.3f}")
    summary = f"""Trained for half the cache, the nine configurations are {ranges[0]} nats from the full one,
and for a quarter {ranges[1]}."""
    return Section(claims, text, summary)
