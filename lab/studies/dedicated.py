"""One stochastic checkpoint against models that were trained for a single plan."""

import numpy as np

from lab.studies.cache import NORMAL, PAPER, SHARED
from lab.studies.deploy import deployed, even_plan
from lab.studies.report import Claim, Section, markdown, percent, spread
from lab.studies.workbench import Workbench, seeded


def dedicated(n_layer: int, n_kv_head: int) -> dict[str, tuple[float, str]]:
    """Models trained for one plan: name -> share of the cache, and settings."""
    shared = (n_layer + 1) / (2 * n_layer)
    return {
        "own K, V of layer 0 (`shared-v`)": (shared, "--plan=shared-v"),
        "CLA-2": (0.5, "--plan=cla:2"),
        "YOCO": (0.5, "--plan=yoco"),
        "GQA, half the KV heads": (0.5, f"--n_kv_head={n_kv_head // 2}"),
        "FusedKV-Lite": (0.5, "--plan=fusedkv-lite"),
        "FusedKV": (0.5, "--plan=fusedkv"),
        "CLA-4": (0.25, f"--plan={even_plan(n_layer, 0.25)}"),
        "MQA, a quarter of the KV heads": (0.25, f"--n_kv_head={n_kv_head // 4}"),
        f"CLA-{n_layer}": (1 / n_layer, "--plan=keep:0"),
    }


def study(bench: Workbench) -> Section:
    single = dedicated(bench.n_layer, n_kv_head=4)
    everything = [NORMAL, PAPER, SHARED, *(settings for _, settings in single.values())]
    bench.train(run for settings in everything for run in seeded(settings))
    rows, losses, flexible = [], {}, {}
    for name, (share, settings) in single.items():
        losses[name] = bench.losses(settings)
        for routed in (PAPER, SHARED):
            spec = deployed(bench, seeded(routed)[0], share)
            flexible[routed, share] = bench.losses(routed, spec)
        above = [spread(flexible[routed, share] - losses[name]) for routed in (PAPER, SHARED)]
        rows.append([name, percent(share), spread(losses[name]), *above])
    claims = []
    for share in sorted({share for share, _ in single.values()}, reverse=True)[:-1]:
        best = min((x for name, x in losses.items() if single[name][0] == share), key=np.mean)
        best_for = f"the best model for one plan of {percent(share)}"
        claims.append(
            Claim(f"V of layer 0 for all is within 1% of {best_for}", 1.01 * best - flexible[SHARED, share])
        )
    full, fused, lite = (x.mean() for x in (bench.losses(NORMAL), losses["FusedKV"], losses["FusedKV-Lite"]))
    half, quarter = (flexible[SHARED, share].mean() for share in (0.5, 0.25))
    summary = f"""Where a full cache has a loss of {full:.3f}, half of it has {fused:.3f} with FusedKV and
{lite:.3f} with FusedKV-Lite; one checkpoint for every size, stochastic with V of layer 0 for all layers and
its K never drawn (`shared-v` from layer 1), has {half:.3f} there and {quarter:.3f} with a quarter."""
    text = """How far above each of these models the two stochastic checkpoints are within the same cache,
paired by seed.

"""
    header = ["trained for one plan", "cache", "loss", "paper's rule above it", "V of layer 0 above it"]
    return Section(claims, text + markdown(header, rows), summary)
