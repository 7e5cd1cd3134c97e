"""Cache against loss: a normal and a stochastic model under many plans, next to models trained for one
plan."""

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


def dedicated(n_layer: int, n_kv_head: int) -> dict[str, tuple[float, str, str]]:
    """Models trained for one plan: name -> share of the cache, settings, and the kind for the picture."""
    shared = (n_layer + 1) / (2 * n_layer)
    return {
        "own K, V of layer 0 (`shared-v`)": (shared, "--plan=shared-v", "V of layer 0"),
        "CLA-2": (0.5, "--plan=cla:2", "CLA, YOCO"),
        "YOCO": (0.5, "--plan=yoco", "CLA, YOCO"),
        "GQA, half the KV heads": (0.5, f"--n_kv_head={n_kv_head // 2}", "GQA, MQA"),
        "FusedKV-Lite": (0.5, "--plan=fusedkv-lite", "FusedKV, Lite"),
        "FusedKV": (0.5, "--plan=fusedkv", "FusedKV, Lite"),
        "CLA-4": (0.25, f"--plan={even_plan(n_layer, 0.25)}", "CLA, YOCO"),
        "MQA, a quarter of the KV heads": (0.25, f"--n_kv_head={n_kv_head // 4}", "GQA, MQA"),
        f"CLA-{n_layer}": (1 / n_layer, "--plan=keep:0", "CLA, YOCO"),
    }


def study(bench: Workbench) -> Section:
    n = bench.n_layer
    single = dedicated(n, n_kv_head=4)
    bench.train(run for settings in FLEXIBLE.values() for run in seeded(settings))
    bench.train(run for _, settings, _ in single.values() for run in seeded(settings))

    model, _ = bench.load(seeded(NORMAL)[0])
    full = costs(model.plan, model.config).cache_bytes_per_token  # bf16
    points = []

    def point(run: str, plan: str, loss: float, ratio: float) -> None:
        size = {"cache_ratio": ratio, "cache_bytes_per_token": ratio * full}
        points.append({"run": run, "plan": plan, "loss": loss} | size)

    rows = []
    for name, settings in FLEXIBLE.items():
        at = []
        for share in BUDGETS:
            spec = deployed(bench, seeded(settings)[0], share)
            at.append(bench.losses(settings, spec))
            point(name, spec, at[-1].mean(), Plan.parse(spec, n).cache_ratio)
        rows.append([name, *map(spread, at)])
    compared = []
    for name, (share, settings, kind) in single.items():
        own = bench.losses(settings)
        above = []
        for flexible in (PAPER, SHARED):
            spec = deployed(bench, seeded(flexible)[0], share)
            above.append(spread(bench.losses(flexible, spec) - own))
        compared.append([name, f"{share:.1%}", spread(own), *above])
        point(f"one plan each: {kind}", name, own.mean(), share)
    draw(points, bench.pictures / "cache.png")

    claims = []
    normal, paper = bench.losses(NORMAL), bench.losses(PAPER)
    for share, words in ((0.5, "half"), (0.25, "a quarter of")):
        plan = even_plan(n, share)
        rise, routed_rise = bench.losses(NORMAL, plan) - normal, bench.losses(PAPER, plan) - paper
        claims.append(Claim(f"With {words} the cache a normal model gets worse", rise))
        claims.append(Claim(f"With {words} the cache a stochastic one loses less", rise - routed_rise))
    text = markdown(["loss at a cache of", *PERCENT], rows)
    text += """
Each model is deployed as suits it best within a share of the cache: see `lab/studies/deploy.py`. Mean and
standard deviation over three seeds.

![loss against cache](PICTURES/cache.png)

What a model trained for one plan alone reaches, and how far above it the two stochastic checkpoints are
within the same cache, paired by seed:

"""
    header = ["trained for one plan", "cache", "loss", "paper's rule above it", "V of layer 0 above it"]
    return Section(claims, text + markdown(header, compared))
