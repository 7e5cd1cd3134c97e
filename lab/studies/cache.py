"""Cache against loss: one checkpoint under many plans, trained normally and in two ways stochastically."""

from costs import costs
from kv_router import Plan
from lab.studies.deploy import deployed, even_plan
from lab.studies.report import Claim, Section, markdown, percent, spread
from lab.studies.workbench import Workbench, seeded
from sweep import draw

NORMAL, PAPER = "", "--router_p=0.5"
SHARED = "--plan=shared-v --router_p=0.3 --router_lowest=1"
FLEXIBLE = {
    "normal": NORMAL,
    "stochastic, the paper's rule": PAPER,
    "stochastic, V of layer 0, its K never drawn": SHARED,
}


def study(bench: Workbench) -> Section:
    n = bench.n_layer
    bench.train(run for settings in FLEXIBLE.values() for run in seeded(settings))
    model, _ = bench.load(seeded(NORMAL)[0])
    full = costs(model.plan, model.config).cache_bytes_per_token  # bf16
    rows, points, losses = [], [], {}
    for name, settings in FLEXIBLE.items():
        for share in bench.shares:
            spec = deployed(bench, seeded(settings)[0], share)
            loss, ratio = bench.losses(settings, spec), Plan.parse(spec, n).cache_ratio
            losses[settings, share] = loss
            size = {"cache_ratio": ratio, "cache_bytes_per_token": ratio * full}
            points.append({"run": name, "plan": spec, "loss": loss.mean()} | size)
        rows.append([name, *(spread(losses[settings, share]) for share in bench.shares)])
    draw(points, bench.pictures / "cache.png")

    normal, paper = bench.losses(NORMAL), bench.losses(PAPER)
    claims = [Claim("The paper's rule has a price at the full cache", paper - normal)]
    rises = {}
    for share, words in ((0.5, "half"), (0.25, "a quarter of")):
        plan = even_plan(n, share)
        rise, routed_rise = bench.losses(NORMAL, plan) - normal, bench.losses(PAPER, plan) - paper
        claims.append(Claim(f"With {words} the cache a normal model gets worse", rise))
        claims.append(Claim(f"With {words} the cache a stochastic one loses less", rise - routed_rise))
        rises[share] = rise.mean(), routed_rise.mean()
    smallest = bench.shares[-2]
    for share in (0.5, smallest):
        effect = normal - losses[SHARED, share]
        with_less = f"with {percent(share)} of the cache"
        better = "V of layer 0, its K never drawn, beats a normal model's full cache"
        claims.append(Claim(f"{better} {with_less}", effect))
    shared = percent(Plan.parse("shared-v", n).cache_ratio)
    text = markdown(["loss at a cache of", *map(percent, bench.shares)], rows)
    text += f"""
Each model is deployed as suits it best within a share of the cache: see `lab/studies/deploy.py`. Mean and
standard deviation over three seeds. With V of layer 0 for all, {shared} of the cache stands for 100%,
and the smallest cache it is trained for is {percent(smallest)}, K of two layers and V of one.

![loss against cache](PICTURES/cache.png)
"""
    summary = f"""With half its cache a normal model's loss rises by {rises[0.5][0]:.3f} nats per token, and
with a quarter by {rises[0.25][0]:.3f}; one trained by the paper's rule rises by {rises[0.5][1]:.3f} and
{rises[0.25][1]:.3f}, from a loss that is {(paper - normal).mean():.3f} higher."""
    return Section(claims, text, summary)
