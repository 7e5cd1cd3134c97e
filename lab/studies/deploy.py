"""The plans under which a checkpoint is deployed within a share of the cache."""

from contextlib import suppress

import numpy as np

from kv_router import Plan, PlanError, Route
from lab.studies.workbench import Workbench
from sweep import sharing, spread


def evenly(n_layer: int, n_kept: int, lowest: int) -> Plan:
    """A plan that keeps n_kept layers: 0 to `lowest`, and above that evenly spread ones."""
    lowest = lowest if n_kept > lowest else 0  # a budget too small for what the model was trained to keep
    return sharing(Plan.parse("full", n_layer), spread(n_layer, n_kept, lowest))


def deployments(n_layer: int, share: float, lowest: int = 0) -> list[str]:
    """Ways to spend a share of the cache: keep K and V of evenly spread layers, and let the others read the
    nearest kept layer below, or its K with V of layer 0; or store V of layer 0 alone, and K of more layers.
    Of a model that was trained with `lowest`, layers 0 to `lowest` are kept."""
    kept = evenly(n_layer, max(1, int(n_layer * share)), lowest)
    bottom_v = [r if r.k == (i,) else Route(r.k, (0,)) for i, r in enumerate(kept.routes)]
    n_keys = max(1, min(n_layer, int(2 * n_layer * share) - 1))
    keys_only = [Route(r.k, (0,)) for r in evenly(n_layer, n_keys, lowest).routes]
    return list(dict.fromkeys(p.spec for p in (kept, Plan(tuple(bottom_v)), Plan(tuple(keys_only)))))


def deployed(bench: Workbench, run: str, share: float) -> str:
    """The best of the `deployments` that a run's model can have within a share of the cache, by its loss on
    training text, so that held-out text does not choose."""
    model, _ = bench.load(run)
    lowest = model.config.router_lowest
    shares = [share, *(x for x in bench.shares if x < share)]
    specs = [spec for x in shares for spec in deployments(bench.n_layer, x, lowest)]
    fitting = []
    for spec in dict.fromkeys(specs):
        with suppress(PlanError):
            fitting.append(model.resolve(spec).spec)
    return min(fitting, key=lambda spec: bench.windows(run, spec, "train", 16).mean())


def losses_within(bench: Workbench, runs: list[str], share: float) -> np.ndarray:
    """The losses of runs within a share of the cache, each as it is deployed there."""
    return np.array([bench.windows(run, deployed(bench, run, share)).mean() for run in runs])
