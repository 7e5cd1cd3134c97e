"""Stochastic routing when data is short: many epochs over a small corpus."""

import json
from pathlib import Path

import numpy as np

import data
from cli import replace_file
from lab.studies.report import ROUTING, Claim, Section, markdown, mean_std
from lab.studies.workbench import Workbench, seeded
from plots import line, picture

SHORT = 1 << 15  # tokens


def shorten(name: str, short: str, n_tokens: int) -> None:
    """data/SHORT: the first tokens of data/NAME's training text, and all of its held-out text."""
    source, folder = Path("data") / name, Path("data") / short
    if (folder / "meta.json").exists():
        return
    if not source.exists():
        data.prepare_dataset(name, source)
    ids, enc = data.Tokens(source, "train", 256).ids[:n_tokens], data.load_tokenizer(source)
    folder.mkdir(exist_ok=True)
    replace_file(folder / "train.bin", ids.tobytes())
    for file in ("val.bin", "tokenizer.tiktoken"):
        replace_file(folder / file, (source / file).read_bytes())
    n_bytes = len(enc.decode_bytes(ids.tolist()))
    counts = {"tokens": n_tokens, "bytes": n_bytes, "sha256": data.sha256(folder / "train.bin")}
    meta = data.read_meta(source) | {"source": f"the first {n_tokens} tokens of {name}", "train": counts}
    replace_file(folder / "meta.json", json.dumps(meta).encode())


def study(bench: Workbench) -> Section:
    shorten("python", "python-short", SHORT)
    often = f"--dataset=python-short --eval_interval={bench.steps // 12}"
    widths = {"narrow": bench.narrow, "middle": ""}
    trained = {
        "normal": "",
        "p = 0.1": "--router_p=0.1",
        "p = 0.2": "--router_p=0.2",
        "p = 0.3": "--router_p=0.3",
    }
    runs = {(w, t): f"{widths[w]} {often} {trained[t]}".strip() for w in widths for t in trained}
    bench.train(run for settings in runs.values() for run in seeded(settings))

    curves = {}  # (width, trained) -> held-out losses by seed and evaluation, without the untrained model's
    for key, settings in runs.items():
        curves[key] = np.array([bench.log(run, "val_loss")[1][1:] for run in seeded(settings)])
    steps = bench.log(seeded(runs["narrow", "normal"])[0], "val_loss")[0][1:]
    with picture(bench.pictures / "regulariser.png", columns=2, sharey=True) as axes:
        for ax, width in zip(axes, widths):
            for i, name in enumerate(trained):
                line(ax, steps, curves[width, name].mean(0), i, name)
            ax.set(title=f"{width} model", xlabel="step")
        axes[0].set_ylabel("held-out loss, full cache")
    claims = []
    for width in widths:
        normal = curves[width, "normal"]
        for name in list(trained)[1:]:
            routed = curves[width, name]
            text = f"On short data routing with {name} helps the {width} model"
            claims.append(Claim(ROUTING, f"{text}: lowest loss", normal.min(1) - routed.min(1)))
            claims.append(Claim(ROUTING, f"{text}: loss at the end", normal[:, -1] - routed[:, -1]))
    epochs = bench.log(seeded(runs["narrow", "normal"])[0], "tokens")[1][-1] / SHORT
    text = f"""{SHORT:,} tokens, read about {epochs:.0f} times, with an evaluation every {steps[0]} steps.
Where the loss is lowest at the first of these, an even lower one before it was not seen.

"""
    rows = []
    for (width, name), curve in curves.items():
        at = sorted({steps[i] for i in curve.argmin(1)})
        rows.append([width, name, mean_std(curve.min(1)), ", ".join(map(str, at)), mean_std(curve[:, -1])])
    text += markdown(["model", "trained", "lowest loss", "at step", "at the end"], rows)
    text += "\n![held-out loss over training](PICTURES/regulariser.png)\n"
    return Section(claims, text)
