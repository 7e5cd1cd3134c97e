"""The price of flexibility: what a stochastic model loses at the full cache, and which rule of drawing is
cheapest."""

import numpy as np

from lab.studies.cache import KEY_RESIDUAL, NORMAL, PAPER, SHARED
from lab.studies.deploy import losses_within
from lab.studies.report import OURS, Claim, Section, markdown, mean_std, percent, series
from lab.studies.workbench import Workbench, seeded
from plots import line, picture

FROM_0 = "--router_p=0.3"  # the paper's rule
FROM_1 = f"{FROM_0} --router_lowest=1"  # the same, but layer 0 is read by itself alone
SHARED_FROM_0 = "--plan=shared-v --router_p=0.3"
RULES = {  # of drawing -> settings, and what it is
    "the paper's": (PAPER, "K and V of one lower layer, drawn evenly, p = 0.5"),
    "the paper's, p = 0.3": (FROM_0, "the paper's rule, drawn less often"),
    "the paper's, falling": ("falling --router_p=0.5", "p falling from 0.5 to 0 in 600 steps"),
    "the paper's, rising": ("rising --router_p=0.5", "p rising from 0 to 0.5 in 600 steps"),
    "the paper's from 1": (FROM_1, "p = 0.3, layer 0 never drawn"),
    "value residual from 1": (f"value-residual {FROM_1}", "layer 0 never drawn, V mixed with its V"),
    "shared-v from 0": (SHARED_FROM_0, "V of layer 0 for all; K own or of a lower layer, p = 0.3"),
    "shared-v from 1": (SHARED, "K of layer 0 never drawn"),
    "key residual": (KEY_RESIDUAL, "p = 0.2, and K of layer 1 is added to that of layers above"),
    "key residual, p = 0.3": (KEY_RESIDUAL.replace("0.2", "0.3"), "the same with p = 0.3"),
    "shared-v from 2": (SHARED.replace("lowest=1", "lowest=2"), "K of layers 0 and 1 never drawn"),
    "shared-v from 1, rungs": (
        f"rungs {SHARED.replace('0.3', '0.2')}",
        "only plans that a sweep deploys are drawn, p = 0.2",
    ),
}
PICTURED = ["the paper's", "the paper's from 1", "shared-v from 0", "shared-v from 1", "key residual"]


def sizes(bench: Workbench) -> dict[str, dict[float, tuple[str, str]]]:
    """What moves -> its values, each with the settings of a normal and a stochastic model."""
    studies = {"p": {p: (NORMAL, f"--router_p={p}") for p in (0.02, 0.05, 0.1, 0.2, 0.5)}}
    steps, layers = bench.steps, bench.n_layer
    for what, flag, values in (
        ("steps", "max_iters", (steps // 2, steps, 4 * steps)),
        ("layers", "n_layer", (layers // 2, layers)),
    ):
        studies[what] = {}
        for value in values:
            flags = "" if value in (steps, layers) else f"--{flag}={value} "
            studies[what][value] = (flags.strip(), flags + PAPER)
    return studies


def by_size(bench: Workbench, ax) -> tuple[str, dict[str, list[str]]]:
    """The price when p, the training or the depth grows: tables, and in words the prices, and at what."""
    text, in_words = "", {}
    for i, (what, values) in enumerate(sizes(bench).items()):
        rows, prices = [], []
        for value, (normal, stochastic) in values.items():
            a, b = bench.losses(normal), bench.losses(stochastic)
            rises = [bench.losses(s, "keep:0") - x for s, x in ((normal, a), (stochastic, b))]
            rows.append([value, mean_std(a), mean_std(b), mean_std(b - a), *map(mean_std, rises)])
            prices.append((b - a).mean())
        header = [what, "normal", "stochastic", "price", "normal's rise with one layer kept", "stochastic's"]
        text += "\n" + markdown(header, rows)
        in_words[what] = [series(f"{price:.3f}" for price in prices), series(f"{x:,}" for x in values)]
        base = {"p": 0.5, "steps": bench.steps, "layers": bench.n_layer}[what]
        line(ax, [value / base for value in values], prices, i, f"{what}, times {base}")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="relative size", ylabel="price, nats per token")
    return text, in_words


def judged(bench: Workbench) -> list[float]:
    """The shares over which rules are compared: without the smallest, which few are made for, and 75%, which
    is the whole cache to shared-v and would count that twice."""
    return [share for share in bench.shares[:-1] if share != 0.75]


def by_rule(bench: Workbench, ax) -> tuple[str, dict[str, np.ndarray]]:
    """A table of the rules, and of each the mean loss over the shares of the cache that are `judged`, by
    seed."""
    percents = [percent(share) for share in bench.shares]
    averages, rows = {}, []
    for name, (settings, meaning) in RULES.items():
        losses = {share: losses_within(bench, seeded(settings), share) for share in bench.shares}
        averages[name] = np.mean([losses[share] for share in judged(bench)], axis=0)
        rows.append([f"`{name}`", *map(mean_std, losses.values()), mean_std(averages[name]), meaning])
        if name in PICTURED:
            line(ax, percents, [x.mean() for x in losses.values()], PICTURED.index(name), name)
    ax.axhline(bench.losses(NORMAL).mean(), color="black", linewidth=0.8, label="normal, full cache")
    ax.set(xlabel="cache at most", ylabel="held-out loss, nats per token")
    return markdown(["rule", *percents, "mean", ""], sorted(rows, key=lambda row: row[-2])), averages


def study(bench: Workbench) -> Section:
    pairs = [settings for values in sizes(bench).values() for pair in values.values() for settings in pair]
    bench.train(run for settings in [NORMAL, *pairs] for run in seeded(settings))
    bench.train(run for settings, _ in RULES.values() for run in seeded(settings))
    with picture(bench.pictures / "price.png", columns=2) as axes:
        prices, in_words = by_size(bench, axes[0])
        rules, averages = by_rule(bench, axes[1])
    normal = bench.losses(NORMAL)
    text = f"""The price: how far a stochastic model is above a normal one at the full cache, paired by seed.
{prices}
Rules of drawing, sorted by the mean over {series(map(percent, judged(bench)))} of the cache. A normal
model at the full cache has {mean_std(normal)}. Every run is deployed as suits it best, see
`lab/studies/deploy.py`. What else was tried, and how the key residual was found, is among the earlier
readings in `results/earlier`.

{rules}
![the price, and rules of drawing](PICTURES/price.png)
"""
    claim = "In the mean over these shares stochastic shared-v beats the paper's rule with the same p"
    claims = [Claim(OURS, claim, averages["the paper's, p = 0.3"] - averages["shared-v from 1"])]
    claim = "In the mean over these shares the key residual helps stochastic shared-v, p = 0.3"
    claims.append(Claim(OURS, claim, averages["shared-v from 1"] - averages["key residual, p = 0.3"]))
    (at_p, p), (after, steps) = in_words["p"], in_words["steps"]
    summary = f"""At the full cache stochastic routing costs {at_p} at p = {p}, and, at p = 0.5, {after} after
{steps} steps."""
    return Section(claims, text, summary)
