"""Which lower layers the upper ones draw on, for K and for V."""

import numpy as np
import torch

from kv_router import Plan
from lab.studies.report import FUSION, Claim, Section, markdown, mean_std
from lab.studies.workbench import Workbench, seeded
from plots import picture


def shares(bench: Workbench, run: str) -> dict[str, np.ndarray]:
    """How much of its K and V each upper layer takes from each lower one: the mean of the gates over heads
    and features, as a share, (upper layers, lower layers)."""
    model, _ = bench.load(run)
    found = {}
    for kind in "kv":
        gates = [getattr(block.attn, f"{kind}_gate") for block in model.blocks[bench.n_layer // 2 :]]
        weight = torch.stack([gate.detach().mean((1, 2, 3)) for gate in gates])
        found[kind.upper()] = (weight / weight.sum(1, keepdim=True)).cpu().numpy()
    return found


def study(bench: Workbench) -> Section:
    n, half = bench.n_layer, bench.n_layer // 2
    storage = list(map(str, range(half)))

    def upper(route: str) -> str:
        spec = "_".join(storage + [route] * (n - half))
        named = [name for name in ("yoco", "fusedkv-lite") if Plan.parse(name, n) == Plan.parse(spec, n)]
        return f"--plan={named[0] if named else spec}"

    every = "+".join(storage)
    dense = f"even {upper(f'k{every}v{every}')}"
    pairs = {(k, v): upper(f"k{k}v{v}") for k in (0, half - 1) for v in (0, half - 1)}
    bench.train(run for settings in (dense, *pairs.values()) for run in seeded(settings))

    by_seed = [shares(bench, run) for run in seeded(dense)]
    average = {kind: np.mean([found[kind] for found in by_seed], axis=0) for kind in "KV"}
    with picture(bench.pictures / "keys_values.png", columns=2) as axes:
        for ax, (kind, share) in zip(axes, average.items()):
            extent = (-0.5, half - 0.5, half - 0.5, n - 0.5)
            ax.imshow(share, cmap="Greys", vmin=0, vmax=0.6, origin="lower", extent=extent)
            for (i, j), s in np.ndenumerate(share):
                ax.text(j, half + i, f"{s:.0%}", ha="center", color="white" if s > 0.4 else "black")
            ax.set(title=f"{kind} of upper layers", xlabel="from lower layer", ylabel="upper layer")
            ax.set(xticks=range(half), yticks=range(half, n))
    low = {kind: np.array([found[kind][:, : half // 2].sum(1).mean() for found in by_seed]) for kind in "KV"}
    losses = {pair: bench.losses(settings) for pair, settings in pairs.items()}
    lite = losses.pop((half - 1, 0))
    claims = [
        Claim(FUSION, "Upper layers draw most of V from the bottom ones", low["V"] - 0.5, "of it"),
        Claim(FUSION, "Upper layers draw more of V than of K from them", low["V"] - low["K"], "of it"),
    ]
    for (k, v), loss in losses.items():
        text = f"Middle K with bottom V is better than K of layer {k} with V of layer {v}"
        claims.append(Claim(FUSION, text, loss - lite))
    text = f"""A model whose upper layers each learn a weighted sum over the K and V of all lower layers
(`{dense}`), all weights starting even. The picture shows the mean of the gates over heads, features and
seeds, as a share of the row; that lower layers' K and V differ in size is not accounted for.

![which lower layers the upper ones draw on](PICTURES/keys_values.png)

Then one source each:

"""
    losses[half - 1, 0] = lite
    rows = sorted((x.mean(), f"K of layer {k}, V of layer {v}", mean_std(x)) for (k, v), x in losses.items())
    return Section(claims, text + markdown(["upper layers read", "loss"], [row[1:] for row in rows]))
