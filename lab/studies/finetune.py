"""Fine-tuning a normal checkpoint for sharing: its loss within every share of the cache, over the number of
tokens that it is fine-tuned on."""

from collections.abc import Iterable

import numpy as np

import hf
from cli import human
from lab.studies.cache import NORMAL, PAPER, SHARED
from lab.studies.deploy import deployed
from lab.studies.price import FROM_1
from lab.studies.report import Claim, Section, markdown, percent, spread
from lab.studies.workbench import SEEDS, Workbench, seeded
from plots import line, picture

# Of 2e-4, 5e-4, 2e-3 and 5e-3 the learning rates with which seed 0 got furthest in 100 steps. V of layer 0
# asks a normal model to learn more.
GENTLE = "--learning_rate=5e-4 --min_lr=5e-5"
STEEP = "--learning_rate=2e-3 --min_lr=2e-4"
CONTROL = f"{GENTLE} {NORMAL}".strip()
PAPERS = f"{GENTLE} {PAPER}"
LAYER_0_OUT = f"{GENTLE} {FROM_1}"
V_OF_0 = f"{STEEP} {SHARED}"
KINDS = {
    "without routing": CONTROL,
    "the paper's rule": PAPERS,
    "the paper's rule, p = 0.3, layer 0 never drawn": LAYER_0_OUT,
    "V of layer 0, its K never drawn": V_OF_0,
}
PICTURED = (1, 0.5, 0.25)  # shares of the cache


def tuned(bench: Workbench, settings: str, steps: int) -> list[str]:
    """The runs that start from the normal model of each seed. The data comes in another order than before."""
    recipe = f"--max_iters={steps} --warmup_iters={steps // 8} {settings}"
    bases = seeded(NORMAL)
    return [
        f"--init_from=hf:{bench.path(base) / 'folder'} {recipe} --seed={SEEDS + i}"
        for i, base in enumerate(bases)
    ]


def within(bench: Workbench, runs: list[str], share: float) -> np.ndarray:
    """The losses of runs within a share of the cache, one per seed, under the plan that is best for the
    first."""
    plan = deployed(bench, runs[0], share)
    return np.array([bench.windows(run, plan).mean() for run in runs])


def export(bench: Workbench, runs: Iterable[str]) -> None:
    """Write runs as Hugging Face folders, which is what train.py can start from."""
    for run in runs:
        folder = bench.path(run) / "folder"
        if not (folder / "config.json").exists():
            hf.save_hf(bench.load(run)[0], folder)


def study(bench: Workbench) -> Section:
    control, papers, layer_0_out, v_of_0 = KINDS
    bases = seeded(NORMAL)
    lengths = (bench.steps // 12, bench.steps // 4, bench.steps // 2)
    bench.train(bases)
    export(bench, bases)
    runs = {(kind, n): tuned(bench, settings, n) for kind, settings in KINDS.items() for n in lengths}
    bench.train(run for group in runs.values() for run in group)

    before = {share: within(bench, bases, share) for share in bench.shares}
    losses = {
        share: {key: within(bench, group, share) for key, group in runs.items()} for share in bench.shares
    }
    n_tokens = {n: bench.log(runs[control, n][0], "tokens")[1][-1] for n in lengths}
    rows = [["before", "", *(spread(before[share]) for share in bench.shares)]]
    for kind, n in runs:
        rows.append([kind, human(n_tokens[n]), *(spread(losses[share][kind, n]) for share in bench.shares)])
    with picture(bench.pictures / "finetune.png", columns=len(PICTURED), sharey=True) as axes:
        for ax, share in zip(axes, PICTURED):
            for i, kind in enumerate(KINDS):
                values = [before[share], *(losses[share][kind, n] for n in lengths)]
                line(ax, [0, *n_tokens.values()], [x.mean() for x in values], i, kind)
            ax.set(title=f"cache {percent(share)}", xlabel="tokens of fine-tuning")
        axes[0].set_ylabel("held-out loss, nats per token")

    claims = []
    for n in lengths:
        after = f"after {human(n_tokens[n])} tokens"
        full, quarter = losses[1], losses[0.25]
        gain = quarter[control, n] - quarter[papers, n]
        claims.append(Claim(f"The paper's rule is better within a quarter of the cache {after}", gain))
        price = full[papers, n] - full[control, n]
        claims.append(Claim(f"and has a price at the full cache {after}", price))
        saved = full[papers, n] - full[layer_0_out, n]
        claims.append(Claim(f"which is smaller if layer 0 is never drawn {after}", saved))
        more = quarter[papers, n] - quarter[v_of_0, n]
        claims.append(Claim(f"V of layer 0 is better than it within a quarter {after}", more))
    text = """The normal models of every seed, fine-tuned on text of the same corpus in another order. Each
is deployed as suits it best within a share of the cache, before and after: see `lab/studies/deploy.py`.

"""
    header = ["fine-tuned", "tokens", *(f"cache {percent(share)}" for share in bench.shares)]
    text += markdown(header, rows) + "\n![loss over tokens of fine-tuning](PICTURES/finetune.png)\n"
    return Section(claims, text, summarize(before, losses, n_tokens))


def summarize(before: dict, losses: dict, n_tokens: dict[int, int]) -> str:
    n = list(n_tokens)[1]
    control, papers, _, _ = KINDS
    quarter, full = losses[0.25], losses[1]
    return f"""Fine-tuning a normal model by the paper's rule on {human(n_tokens[n])} tokens takes its loss
with a quarter of the cache from {before[0.25].mean():.3f} to {quarter[papers, n].mean():.3f}; with the full
one it is {full[papers, n].mean():.3f}, and fine-tuned without routing {full[control, n].mean():.3f}."""
