"""FusedKV against the rest, at equal tokens and equal cache."""

import numpy as np
import torch

from cli import human
from lab.studies.report import FUSION, Claim, Section, markdown, mean_std
from lab.studies.workbench import Workbench, seeded
from plots import line, picture

METHODS = {
    "full cache": "",
    "CLA-2": "--plan=cla:2",
    "YOCO": "--plan=yoco",
    "GQA": "--n_kv_head=2",
    "FusedKV-Lite": "--plan=fusedkv-lite",
    "FusedKV": "--plan=fusedkv",
}
GATES = {
    "tied by RoPE (FusedKV)": "--plan=fusedkv",
    "untied": "untied --plan=fusedkv",
    "untied, fused before RoPE": "before-rope --plan=fusedkv",
    "tied, starting even": "even --plan=fusedkv",
}

CURVES = """
![loss curves](PICTURES/fusion.png)

The curves are losses of training batches, averaged over three points of the log, of the first seed alone.

"""


def study(bench: Workbench) -> Section:
    sizes = {"narrow": bench.narrow, "middle": ""}
    runs = {(m, s): f"{sizes[s]} {METHODS[m]}".strip() for m in METHODS for s in sizes}
    bench.train(run for settings in [*runs.values(), *GATES.values()] for run in seeded(settings))
    losses = {key: bench.losses(settings) for key, settings in runs.items()}
    rows = []
    for method in METHODS:
        above = [losses[method, s] - losses["full cache", s] for s in sizes]
        cells = [f"{mean_std(losses[method, s])} ({x.mean():+.3f})" for s, x in zip(sizes, above)]
        rows.append([method, "100%" if method == "full cache" else "50%", *cells])
    better = [("FusedKV", "full cache"), ("FusedKV-Lite", "full cache"), ("FusedKV", "FusedKV-Lite")]
    better += [("FusedKV-Lite", other) for other in ("CLA-2", "YOCO", "GQA")]
    claims = []
    for a, b in better:
        for size in sizes:
            effect = losses[b, size] - losses[a, size]
            claims.append(Claim(FUSION, f"{a} is better than {b} ({size})", effect))
    tied, untied, before, even = (bench.losses(settings) for settings in GATES.values())
    claims.append(Claim(FUSION, "Gates tied by RoPE are better than untied ones", untied - tied))
    claims.append(Claim(FUSION, "Fusing after RoPE is better than before", before - tied))
    claims.append(Claim(FUSION, "Gates that start as FusedKV-Lite are better than even ones", even - tied))
    draw_curves(bench, runs, sizes)
    draw_gates(bench)
    params = [
        sum(p.numel() for p in bench.load(seeded(runs["full cache", s])[0])[0].parameters()) for s in sizes
    ]
    header = ["", "cache", *(f"{s}, {human(p)} parameters" for s, p in zip(sizes, params))]
    text = "Loss, and in brackets how far it is above the full cache's of the same size.\n\n"
    text += markdown(header, rows) + CURVES + "How FusedKV's gates are bound:\n\n"
    text += markdown(["gates", "loss"], [[name, mean_std(bench.losses(s))] for name, s in GATES.items()])
    text += (
        f"\nGates after training; K from layer {bench.n_layer // 2 - 1} and V from layer 0 started at 1, the "
    )
    return Section(claims, text + "others at 0.\n\n![gates](PICTURES/gates.png)\n")


def draw_curves(bench: Workbench, runs: dict, sizes: dict) -> None:
    """Training losses above the full cache's, which saw the same batches."""
    with picture(bench.pictures / "fusion.png", columns=2) as axes:
        for ax, size in zip(axes, sizes):
            _, full = bench.log(seeded(runs["full cache", size])[0], "train_loss")
            for i, method in enumerate(METHODS):
                steps, values = bench.log(seeded(runs[method, size])[0], "train_loss")
                smooth = np.convolve(np.subtract(values, full), np.ones(3) / 3, "valid")
                line(ax, steps[1:-1], smooth, i, method, markers=False)
            ax.set(title=f"{size} model", xlabel="step")
        axes[0].set_ylabel("training loss above the full cache's")


def draw_gates(bench: Workbench) -> None:
    half = bench.n_layer // 2
    model, _ = bench.load(seeded(GATES["tied by RoPE (FusedKV)"])[0])
    with picture(bench.pictures / "gates.png", columns=4, width=3.5) as axes:
        for ax, (kind, m) in zip(axes, [(kind, m) for kind in "kv" for m in (0, 1)]):
            stack = [getattr(block.attn, f"{kind}_gate")[m].flatten() for block in model.blocks[half:]]
            gate = torch.stack(stack).detach().cpu().numpy()
            extent = (0, gate.shape[1], half - 0.5, bench.n_layer - 0.5)
            look = {"cmap": "Greys", "vmin": -0.5, "vmax": 1.5, "aspect": "auto", "interpolation": "nearest"}
            ax.figure.colorbar(ax.imshow(gate, origin="lower", extent=extent, **look), ax=ax)
            features = "RoPE pairs" if kind == "k" else "features"
            ax.set(title=f"{kind.upper()} from layer {(0, half - 1)[m]}", xlabel=f"KV heads x {features}")
            ax.set(yticks=range(half, bench.n_layer))
        axes[0].set_ylabel("layer")
