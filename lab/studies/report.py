"""Claims, tables and pictures of RESULTS.md, which is written from the logs of runs alone."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from cli import duration, replace_file
from lab.studies.workbench import Workbench

# Student's t: how many standard errors a mean of n values may be off, with a chance of 95%.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


ROUTING, FUSION, FRAMEWORK = "2604.22782", "2512.03870", "2410.14442"  # the papers, on arXiv
OURS = "ours"


@dataclass
class Claim:
    """What is claimed, by `source`, one of the papers or this project, and what was measured. `effects` has
    one value per seed, positive where the claim holds: differences of runs that saw the same batches."""

    source: str
    text: str
    effects: Sequence[float]
    unit: str = "nats"

    def row(self) -> list[str]:
        effects = list(map(float, self.effects))
        effect = f"{mean(effects):+.3f} {self.unit}"
        margin = T_95[len(effects)] * stdev(effects) / len(effects) ** 0.5
        verdict = "not shown"
        if abs(mean(effects)) > margin:
            verdict = "appeared" if mean(effects) > 0 else "opposite"
        return [self.source, self.text, effect, f"± {margin:.3f}", str(len(effects)), verdict]


@dataclass
class Section:
    """What a study says: its claims, Markdown in which PICTURES becomes the folder of the pictures, and a
    sentence or two for the reader of the first paragraph."""

    claims: list[Claim] = field(default_factory=list)
    text: str = ""
    summary: str = ""


def mean_std(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    values = list(map(float, values))
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def series(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def provenance(bench: Workbench) -> str:
    """Where the numbers of a section come from."""
    runs = [json.loads((bench.path(run) / "run.json").read_text()) for run in bench.used]
    spent = duration(sum(bench.log(run, "time")[1][-1] for run in bench.used))
    commit, device, dtype, torch, python = (
        ", ".join(sorted({str(run[key]).removeprefix("torch.") for run in runs}))
        for key in ("commit", "device", "dtype", "torch", "python")
    )
    return (
        f"{len(runs)} runs of {spent} in all; commit {commit}; {device}, trained in {dtype}, "
        f"torch {torch}, Python {python}."
    )


def keep(bench: Workbench, name: str, section: Section) -> None:
    """Keep a study's section beside its pictures, for `write_results` in this sitting and later ones."""
    claims = [claim.row() for claim in section.claims]
    part = {
        "claims": claims,
        "text": section.text,
        "summary": section.summary,
        "provenance": provenance(bench),
    }
    bench.pictures.mkdir(exist_ok=True)
    replace_file(bench.pictures / f"{name}.json", json.dumps(part, indent=1).encode() + b"\n")


NOT_TESTED = """
## What could not be tested here

The papers' scale (332 M parameters and more, GPUs), and their benchmarks ARC, HellaSwag and MMLU:
`python -m lab.tasks` runs them on any checkpoint and plan, but their data was not at hand.
"""
CLAIMS = ["study", "source", "claim", "effect", "95% interval", "seeds", "verdict"]


def write_results(bench: Workbench, titles: dict[str, str], path: Path) -> None:
    """RESULTS.md from the sections that are there."""
    flags = "" if bench.name == "cpu" else f" --set {bench.name}"
    parts = {name: bench.pictures / f"{name}.json" for name in titles}
    parts = {name: json.loads(part.read_text()) for name, part in parts.items() if part.exists()}
    in_short = " ".join(part["summary"] for part in parts.values() if part["summary"])
    rows, sections = [], ""
    for name, part in parts.items():
        title = titles[name]
        rows += [[f"[{title}](#{title.lower().replace(' ', '-')})", *row] for row in part["claims"]]
        command = f"python -m lab.studies {name}{flags}"
        sections += f"\n## {title}\n\n`{command}`: {part['provenance']}\n\n{part['text']}"
    text = f"""# Results

{textwrap.fill(in_short, 110)}

Written by `python -m lab.studies all{flags}` from the logs of its runs; no number is typed by hand. Every run
is `python train.py {" ".join(bench.base)}` and the settings that its table names. Losses are nats per token
on 64 held-out windows. These models are far smaller than the papers' and are trained for minutes: what
appears here is the direction of an effect, not its size.

The source of a claim is a paper, by its arXiv number, or this project. Its effect is positive where it holds:
the mean over seeds of differences between runs that saw the same batches in the same order. It *appeared* if
its 95% interval (Student's t over the seeds) lies above zero, is *opposite* if that lies below, and is *not
shown* otherwise: three seeds leave it open. The intervals say nothing about other text than these windows,
nor do they allow for how many claims there are. The same windows chose the step whose weights are measured.
Sections name their commits: between some of these the same settings and seed give slightly different losses,
and where a section says so, the plan that is best for the first seed is measured for all of them.

"""
    text += markdown(CLAIMS, rows) + sections + NOT_TESTED
    if missing := [title for name, title in titles.items() if name not in parts]:
        text += f"\nStill to be run, by `python -m lab.studies all{flags}`: {'; '.join(missing)}.\n"
    replace_file(path, text.replace("PICTURES", bench.pictures.name).encode())
    print(f"wrote {path}")
