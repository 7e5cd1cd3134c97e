"""Cache against loss: one checkpoint under many plans, however it was trained."""

import numpy as np

from cli import human
from kv_router import Plan
from lab.studies.deploy import losses_within
from lab.studies.report import FUSION, OURS, ROUTING, Claim, Section, markdown, mean_std, percent
from lab.studies.workbench import Workbench, seeded
from plots import label_percentages, line, picture

NORMAL, PAPER = "", "--router_p=0.5"
SHARED = "--plan=shared-v --router_p=0.3 --router_lowest=1"
KEY_RESIDUAL = "--plan=shared-v --key_residual=true --router_p=0.2 --router_lowest=1"
FLEXIBLE = {"normal": NORMAL, "stochastic": PAPER, "stochastic shared-v": SHARED}
# shared-v without routing is the control: beside it shows what routing costs, and what it gains.
MODELS = FLEXIBLE | {
    "key residual": KEY_RESIDUAL,
    "shared-v, not routed": "--plan=shared-v",
    "FusedKV": "--plan=fusedkv",
}

Losses = dict[str, dict[float, np.ndarray]]  # name of a model -> share of the cache -> one loss per seed


def train_models(bench: Workbench, sizes: list[str]) -> None:
    """MODELS in several sizes, each given by settings such as --n_embd=256."""
    bench.train(run for size in sizes for s in MODELS.values() for run in seeded(f"{size} {s}".strip()))


def by_share(bench: Workbench, size: str) -> Losses:
    """The losses of MODELS of one size, within every share of the cache."""
    losses = {}
    for name, settings in MODELS.items():
        settings = f"{size} {settings}".strip()
        if name == "FusedKV":  # it has one plan, for half the cache
            half = bench.losses(settings)
            losses[name] = {share: half for share in bench.shares if share >= 0.5}
        else:
            losses[name] = {share: losses_within(bench, seeded(settings), share) for share in bench.shares}
    return losses


def describe(bench: Workbench, size: str) -> str:
    """How large the models of a size are, and how long they were trained."""
    run = seeded(size)[0]
    n_parameters = sum(p.numel() for p in bench.load(run)[0].parameters())
    return f"{human(n_parameters)} parameters, {human(bench.log(run, 'tokens')[1][-1])} tokens"


def draw(ax, losses: Losses, title: str) -> None:
    """Losses against the share of the cache, with their standard deviation over seeds."""
    for i, (name, found) in enumerate(losses.items()):
        means = [x.mean() for x in found.values()]
        line(ax, list(found), means, i, name)
        ax.errorbar(list(found), means, [x.std(ddof=1) for x in found.values()], ls="", color="grey")
    ax.set_xscale("log", base=2)  # small caches are close together
    ax.minorticks_off()
    label_percentages(ax, losses["normal"])
    ax.set(title=title, xlabel="KV cache, at most this share of a full one")


def table(losses: Losses) -> str:
    shares = list(losses["normal"])
    rows = [
        [name, *(mean_std(found[share]) if share in found else "" for share in shares)]
        for name, found in losses.items()
    ]
    return markdown(["loss at a cache of at most", *map(percent, shares)], rows)


def claims(bench: Workbench, losses: Losses, where: str = "") -> list[Claim]:
    normal, paper, shared, residual, unrouted, fused = losses.values()
    found = [(OURS, "Stochastic routing has a price at the full cache", paper[1] - normal[1])]
    for share, words in ((0.5, "half"), (0.25, "a quarter of")):
        rise, routed_rise = normal[share] - normal[1], paper[share] - paper[1]
        found.append((ROUTING, f"A normal model gets worse with {words} the cache", rise))
        found.append((ROUTING, f"A stochastic model loses less with {words} the cache", rise - routed_rise))
    for share in sorted({0.5, 0.25, bench.shares[-2]}, reverse=True):
        text = f"Key residual with {percent(share)} of the cache beats a normal model with all of it"
        found.append((OURS, text, normal[1] - residual[share]))
    for name, beaten in (("stochastic routing", paper), ("stochastic shared-v", shared)):
        found.append((OURS, f"With half the cache key residual beats {name}", beaten[0.5] - residual[0.5]))
    text = "Key residual is worse than unrouted shared-v where all its cache is kept"
    found.append((OURS, text, residual[1] - unrouted[1]))
    text = "Key residual is better than unrouted shared-v where a quarter of the cache is kept"
    found.append((OURS, text, unrouted[0.25] - residual[0.25]))
    found.append((FUSION, "FusedKV beats a normal model with all its cache", normal[1] - fused[0.5]))
    return [Claim(source, text + where, effects) for source, text, effects in found]


def study(bench: Workbench) -> Section:
    train_models(bench, [""])
    losses = by_share(bench, "")
    with picture(bench.pictures / "cache.png", width=6.5) as ax:
        draw(ax, losses, describe(bench, ""))
        ax.set_ylabel("held-out loss, nats per token")
    shared = percent(Plan.parse("shared-v", bench.n_layer).cache_ratio)
    text = f"""Within each share of the cache every run is deployed under the plan, out of a few, that has the
lowest loss on training text (`lab/studies/deploy.py`). Mean and standard deviation over three seeds.
*Stochastic* is the rule of 2604.22782 with p = 0.5. *Shared-v* has V of layer 0 in all layers, as SVFormer
(2410.17897): {shared} of a full cache. *Stochastic shared-v*, ours, also draws K of layer 1 and up with
p = 0.3, and is trained for {percent(bench.shares[-2])} of a full cache or more, K of two layers and V of one.
*Key residual* has p = 0.2 and `--key_residual`: K of layer 1 is added to those of layers above.

{table(losses)}
![loss against cache](PICTURES/cache.png)
"""
    normal, paper = losses["normal"], losses["stochastic"]
    rises = [(x[share] - x[1]).mean() for x in (normal, paper) for share in (0.5, 0.25)]
    summary = f"""With half its cache a normal model's loss rises by {rises[0]:.3f} nats per token, and with a
quarter by {rises[1]:.3f}; one with stochastic routing rises by {rises[2]:.3f} and {rises[3]:.3f}, from
a loss that is {(paper[1] - normal[1]).mean():.3f} higher."""
    return Section(claims(bench, losses), text, summary)
