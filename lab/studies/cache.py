"""Cache against loss: one checkpoint under many plans, trained normally and in two ways stochastically."""

from costs import costs
from kv_router import Plan
from lab.studies.deploy import BUDGETS, PERCENT, deployed, even_plan
from lab.studies.report import Claim, Section, markdown, spread
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
        for share in BUDGETS:
            spec = deployed(bench, seeded(settings)[0], share)
            loss, ratio = bench.losses(settings, spec), Plan.parse(spec, n).cache_ratio
            losses[settings, share] = loss
            size = {"cache_ratio": ratio, "cache_bytes_per_token": ratio * full}
            points.append({"run": name, "plan": spec, "loss": loss.mean()} | size)
        rows.append([name, *(spread(losses[settings, share]) for share in BUDGETS)])
    draw(points, bench.pictures / "cache.png")

    claims = []
    normal, paper = bench.losses(NORMAL), bench.losses(PAPER)
    for share, words in ((0.5, "half"), (0.25, "a quarter of")):
        plan = even_plan(n, share)
        rise, routed_rise = bench.losses(NORMAL, plan) - normal, bench.losses(PAPER, plan) - paper
        claims.append(Claim(f"With {words} the cache a normal model gets worse", rise))
        claims.append(Claim(f"With {words} the cache a stochastic one loses less", rise - routed_rise))
    claims.append(Claim("The paper's rule has a price at the full cache", paper - normal))
    for share, words in ((0.5, "half"), (0.1875, "a fifth of")):
        effect = normal - losses[SHARED, share]
        text = f"With {words} the cache, V of layer 0 and its K never drawn beats a normal model's full cache"
        claims.append(Claim(text, effect))
    text = markdown(["loss at a cache of", *PERCENT], rows)
    text += """
Each model is deployed as suits it best within a share of the cache: see `lab/studies/deploy.py`. Mean and
standard deviation over three seeds. With V of layer 0 for all, 56% of the cache stands for 100%, and its
smallest cache, K of two layers and V of one, is 19%.

![loss against cache](PICTURES/cache.png)
"""
    return Section(claims, text)
