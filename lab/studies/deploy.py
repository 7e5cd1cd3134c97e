"""The plans under which a checkpoint is deployed within a share of the cache."""

from contextlib import suppress

from kv_router import Plan, PlanError, Route
from lab.studies.workbench import Workbench

BUDGETS = (1, 0.75, 0.5, 0.25, 0.125)
PERCENT = [f"{100 * share:g}%" for share in BUDGETS]


def even_plan(n_layer: int, share: float) -> str:
    """Evenly spread kept layers, as many as the share of the cache allows."""
    return Plan.parse(f"lasagna-bottom:{max(1, round(n_layer * share))}", n_layer).spec


def deployments(n_layer: int, share: float) -> list[str]:
    """Ways to spend a share of the cache: keep K and V of evenly spread layers, and let the others read the
    nearest below, or its K and V of layer 0; or store V of layer 0 only, and K of more layers."""
    kept = Plan.parse(even_plan(n_layer, share), n_layer)
    bottom_v = [r if r.k == (i,) else Route(r.k, (0,)) for i, r in enumerate(kept.routes)]
    n_keys = max(1, min(n_layer, round(2 * n_layer * share) - 1))
    keys = Plan.parse(f"lasagna-bottom:{n_keys}", n_layer)
    keys_only = [Route(r.k, (0,)) for r in keys.routes]
    return list(dict.fromkeys(p.spec for p in (kept, Plan(tuple(bottom_v)), Plan(tuple(keys_only)))))


def deployed(bench: Workbench, run: str, share: float) -> str:
    """The best of the `deployments` that a run's model can have within a share of the cache, on training
    text, so that it is not held-out text that chooses."""
    model, _ = bench.load(run)
    fitting = []
    for spec in dict.fromkeys(s for x in BUDGETS if x <= share for s in deployments(bench.n_layer, x)):
        with suppress(PlanError):
            fitting.append(model.resolve(spec).spec)
    return min(fitting, key=lambda spec: bench.windows(run, spec, "train", 16).mean())
