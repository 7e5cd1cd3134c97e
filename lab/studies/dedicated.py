"""One stochastic checkpoint against models that were trained for a single plan."""

from lab.studies.cache import PAPER, SHARED
from lab.studies.deploy import deployed, even_plan
from lab.studies.report import Section, markdown, spread
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
    everything = [PAPER, SHARED, *(settings for _, settings in single.values())]
    bench.train(run for settings in everything for run in seeded(settings))
    rows = []
    for name, (share, settings) in single.items():
        own = bench.losses(settings)
        above = []
        for flexible in (PAPER, SHARED):
            spec = deployed(bench, seeded(flexible)[0], share)
            above.append(spread(bench.losses(flexible, spec) - own))
        rows.append([name, f"{share:.1%}", spread(own), *above])
    text = """How far above each of these models the two stochastic checkpoints are within the same cache,
paired by seed.

"""
    header = ["trained for one plan", "cache", "loss", "paper's rule above it", "V of layer 0 above it"]
    return Section([], text + markdown(header, rows))
