"""Accuracy by plan: multiple choice of continuations of held-out text, in HellaSwag's form."""

import numpy as np
import torch

from kv_router import Plan
from lab.studies.cache import FLEXIBLE
from lab.studies.deploy import deployed
from lab.studies.report import ROUTING, Claim, Section, markdown, mean_std, percent
from lab.studies.workbench import Workbench, seeded

SHARES = (1, 0.5, 0.25)


@torch.no_grad()
def right_choices(bench: Workbench, run: str, plan: str, n: int = 256) -> np.ndarray:
    """3/8 of a window of held-out text, and its true next eighth against three pieces from elsewhere. Right
    (1) where the true one is the likeliest per token; all have the same number of tokens."""

    def measure():
        model, tokens = bench.load(run)
        size = tokens.block_size // 8
        text = torch.cat([x for x, _ in tokens.held_out(n, 16)])[:, : 4 * size]
        for i, row in enumerate(text):
            others = text[[(i + len(text) * k // 4) % len(text) for k in (1, 2, 3)], 3 * size :]
            ends = torch.cat((row[None, 3 * size :], others))
            rows = torch.cat((row[: 3 * size].expand(4, -1), ends), dim=1).to(model.embed.weight.device)
            losses = model.losses(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), plan)
            yield losses[:, -size:].mean(1).argmin() == 0

    return bench.measured(run, f"choices {plan} {n}", measure)


def study(bench: Workbench) -> Section:
    bench.train(run for settings in FLEXIBLE.values() for run in seeded(settings))
    right, rows = {}, []
    for name, settings in FLEXIBLE.items():
        for share in SHARES:
            found = [right_choices(bench, run, deployed(bench, run, share)) for run in seeded(settings)]
            right[name, share] = np.mean(found, axis=1)
        rows.append([name, *(mean_std(right[name, share]) for share in SHARES)])
    lost = {name: right[name, 1] - right[name, 0.25] for name in FLEXIBLE}
    unit = "of answers"
    claims = [
        Claim(ROUTING, "A normal model is less accurate with a quarter of the cache", lost["normal"], unit),
        Claim(ROUTING, "A stochastic model loses less accuracy", lost["normal"] - lost["stochastic"], unit),
    ]
    shared = percent(Plan.parse("shared-v", bench.n_layer).cache_ratio)
    text = f"""A piece of held-out text, and its true continuation against three pieces from elsewhere; 256
questions, chance is 0.25. The whole cache of shared-v is {shared} of a full one.

"""
    return Section(claims, text + markdown(["accuracy at a cache of", "100%", "50%", "25%"], rows))
