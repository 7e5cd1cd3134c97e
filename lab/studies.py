"""The papers' claims in miniature, and what they come to in RESULTS.md.

python -m lab.studies cache        one study: trains and measures what results/cache.json does not have yet
python -m lab.studies all          every one of them (make results)
python -m lab.studies write        only writes RESULTS.md and its pictures, from results/*.json

The studies themselves are data, in lab/studies.toml. Runs that are done are not done again, and those that
were stopped go on. To measure a study anew, delete its file in results/."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import mean, stdev

from lab import measures
from support import cli
from support.cli import Parser, duration, read_json, replace_file
from support.hf import save_hf
from support.plots import label_percentages, line, picture, style
from support.runs import load_run

import numpy as np

RUNS, RESULTS = Path("out/studies"), Path("results")
STUDIES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
for _study in STUDIES.values():
    _study |= STUDIES.get(_study.get("like"), {}) | _study | {"shares": _study.get("shares", [None])}
T_95 = 4.30  # Student's t for three seeds: how many standard errors a mean may be off, with a chance of 95%
Numbers = dict[str, list[float]]  # "run" or "run@share of the cache" -> one number per seed


# --- training and measuring -------------------------------------------------------------------------------


def train(settings: str, seed: int) -> Path:
    """Train one run, or go on with it where it was stopped. Returns its folder."""
    out = RUNS / re.sub(r"[^\w.+]+", "-", f"{settings} {seed}").strip("-")
    if (out / "finished").exists():
        return out
    print(f"--- {out}", flush=True)
    words = [*settings.format(seed=seed).split(), f"--seed={seed}", f"--out_dir={out}"]
    words += ["--init_from=resume"] if any(out.glob("*.pt")) else []
    try:
        child = subprocess.Popen([sys.executable, "train.py", *words])
        status = child.wait()
    except KeyboardInterrupt:  # the run has heard it too, and saves
        status = child.wait()
    if status:
        sys.exit(status)
    (out / "finished").touch()
    return out


def export_normal() -> None:
    """Write the normal models of the first study as Hugging Face folders, which is what fine-tuning starts
    from."""
    recipe = next(iter(STUDIES["cache"]["recipes"].values()))
    for seed in (0, 1, 2):
        if not (folder := RUNS / f"normal-{seed + 3}").exists():
            save_hf(load_run(train(recipe, seed))[0], folder)


def measured(what: str, out: Path, share: float | None) -> float | None:
    """What a run comes to within a share of the cache, or None where it has no such plan. Kept with the
    run."""
    path, key = out / "measured.json", f"{what} {share}"
    known = read_json(path, "delete it") if path.exists() else {}
    if key not in known:
        known[key] = getattr(measures, what)(out, share)
        replace_file(path, json.dumps(known).encode())
    return known[key]


def effects(inequality: str, x: Numbers) -> np.ndarray:
    """By how much an inequality such as "{a@0.5} < 1.01 * {b@1} - {c}" holds, for every seed. It stands in
    studies.toml, which is source of ours, so it may be evaluated as such."""
    code = re.sub(r"\{(.+?)\}", lambda name: f"x[{name[1]!r}]", inequality)
    arrays = {name: np.array(values) for name, values in x.items()}
    smaller, larger = (eval(side.strip(), {"x": arrays}) for side in code.split("<"))
    return larger - smaller


def conduct(study: dict) -> dict:
    """Train and measure a study: its numbers, [mean, standard deviation] by recipe, run and share, its
    claims, [effect, margin] by claim and label, and where they come from."""
    if "prepare" in study:
        (globals().get(study["prepare"]) or getattr(measures, study["prepare"]))()
    numbers, claims, about = {}, {}, []
    for column, recipe in study["recipes"].items():
        x, rows = {}, numbers.setdefault(column, {})
        for run, settings in study["runs"].items():
            outs = [train(f"{recipe} {settings}".strip(), seed) for seed in study.get("seeds", (0, 1, 2))]
            about += [
                (read_json(out / "run.json", "train it"), read_json(out / "log.jsonl", "", lines=True))
                for out in outs
            ]
            for share in study["shares"]:
                found = [measured(study.get("measure", "loss"), out, share) for out in outs]
                if None not in found:
                    x[run if share is None else f"{run}@{share}"] = found
                    pair = [round(mean(found), 6), round(stdev(found), 6)]
                    rows.setdefault(run, {})["" if share is None else str(share)] = pair
        for key, (_, _, wanted) in study["claims"].items():
            labelled = [(column, wanted)] if isinstance(wanted, str) else [w.split(": ", 1) for w in wanted]
            for label, inequality in labelled:
                values = effects(inequality, x).tolist()
                margin = T_95 * stdev(values) / len(values) ** 0.5
                claims.setdefault(key, {})[label] = [round(mean(values), 6), round(margin, 6)]
    facts = (
        ", ".join(sorted({str(run[key]) for run, _ in about}))
        for key in ("commit", "device", "dtype", "torch")
    )
    spent = duration(sum(log[-1]["time"] for _, log in about))
    return {
        "provenance": f"{len(about)} runs of {spent}; " + "; ".join(facts),
        "numbers": numbers,
        "claims": claims,
    }


# --- RESULTS.md -------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in [header, *rows])
    return "\n".join([first, "|---" * len(header) + "|", *others])


def section(name: str, study: dict, found: dict) -> str:
    """A study's part of RESULTS.md: what it is, a table for every recipe, and a picture, which is drawn."""
    parts = [f"## {study['title']}", study["text"], f"`python -m lab.studies {name}`: {found['provenance']}."]
    with picture(RESULTS / f"{name}.png", len(found["numbers"]), width=4.5, squeeze=False) as axes:
        for ax, (column, x) in zip(axes[0], found["numbers"].items()):
            shares = list(dict.fromkeys(share for row in x.values() for share in row))
            header = [f"{100 * float(share):.3g}%" if share else "loss" for share in shares]
            rows = []
            for run, row in x.items():
                # What was carried over from an earlier version can lack the deviation.
                cells = [" ± ".join(f"{x:.3f}" for x in row.get(s, ()) if x is not None) for s in shares]
                rows.append([run, *cells])
            parts.append(markdown([column, *header], rows))
            (draw_lines if shares[0] else draw_marks)(ax, x)
            ax.set_title(column or study["title"])
    parts += [found["note"]] if "note" in found else []
    return "\n\n".join([*parts, f"![{study['title']}](results/{name}.png)"])


def draw_lines(ax, x: dict) -> None:
    """A line for every run over the share of the cache."""
    for i, (run, row) in enumerate(x.items()):
        line(ax, list(map(float, row)), [mean for mean, _ in row.values()], i, run)
    ax.set_xscale("log", base=2)  # small caches are close together
    ax.minorticks_off()
    label_percentages(ax, sorted({float(share) for row in x.values() for share in row}))
    ax.set_xlabel("KV cache, at most this share of a full one")


def draw_marks(ax, x: dict) -> None:
    """A mark for every run, with its standard deviation over seeds."""
    means, deviations = zip(*(row[""] for row in x.values()))
    ax.errorbar(means, range(len(x)), xerr=deviations, fmt="o", color=style(0)[2], capsize=3)
    ax.set_yticks(range(len(x)), list(x), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("held-out loss, nats per token")
    ax.grid(alpha=0.25)


def claims_table(found: dict[str, dict]) -> str:
    """A row for every claim, with its effect in every column of every study that makes it. It appeared if its
    95% interval lies above zero, is opposite if that lies below, and is not shown otherwise."""
    merged, rows = {}, []
    for name, numbers in found.items():
        for key, by_label in numbers["claims"].items():
            merged.setdefault(tuple(STUDIES[name]["claims"][key][:2]), {}).update(by_label)
    # A claim that several studies test is one row.
    for (source, sentence), by_label in merged.items():
        cells = [
            f"{label} {effect:+.3f} ± {margin:.3f}".strip() for label, (effect, margin) in by_label.items()
        ]
        words = []
        for effect, margin in by_label.values():
            words.append("not shown" if abs(effect) <= margin else "appeared" if effect > 0 else "opposite")
        words = words[:1] if len(set(words)) == 1 else words
        rows.append([source, sentence, "; ".join(cells), ", ".join(words)])
    return markdown(["source", "claim", "effect, with its 95% interval", "verdict"], rows)


def write_results() -> None:
    """RESULTS.md and its pictures, from the numbers in results/ and the text around them in
    results/README.md."""
    paths = {name: RESULTS / f"{name}.json" for name in STUDIES}
    found = {name: read_json(path, "run the study") for name, path in paths.items() if path.exists()}
    if "cache" in found:  # the README's first picture
        x = found["cache"]["numbers"]["2,400 steps"]
        with picture(RESULTS / "first.png", width=5.5) as ax:
            draw_lines(ax, {run: row for run, row in x.items() if run != "shared-v, not routed"})
            ax.set_ylabel("held-out loss, nats per token")
    head, _, archive = (RESULTS / "README.md").read_text(encoding="utf-8").partition("<!-- the studies -->")
    sections = [section(name, STUDIES[name], numbers) for name, numbers in found.items()]
    text = "\n\n".join([head.strip(), claims_table(found), *sections, archive.strip()])
    replace_file(Path("RESULTS.md"), (text + "\n").encode())
    print("wrote RESULTS.md")


def main():
    parser = Parser(__doc__)
    parser.add_argument("study", choices=[*STUDIES, "all", "write"], help="which one to run")
    chosen = parser.parse_args().study
    for name in {"all": list(STUDIES), "write": []}.get(chosen, [chosen]):
        if not (path := RESULTS / f"{name}.json").exists():
            replace_file(path, json.dumps(conduct(STUDIES[name]), indent=1).encode() + b"\n")
    write_results()


if __name__ == "__main__":
    cli.run(main)
