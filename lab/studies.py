"""The papers' claims in miniature, and what they come to in RESULTS.md.

python -m lab.studies cache        one study: trains and measures what results/cache.json does not have yet
python -m lab.studies all          every one of them (make results)
python -m lab.studies write        only writes RESULTS.md and its pictures, from results/*.json

A study is data: recipes and settings of train.py, the shares of the cache at which each run is measured, and claims
about the numbers. Runs that are done are not done again, and those that were stopped go on. To measure a study
anew, delete its file in results/."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from kv_router import SHAPES
from lab import measures
from support import cli
from support.cli import Parser, duration, read_json, read_lines, replace_file
from support.plots import STYLES, label_percentages, line, picture

RUNS, RESULTS = Path("out/studies"), Path("results")
T_95 = 4.30  # Student's t for three seeds: how many standard errors a mean may be off, with a chance of 95%
ROUTING, FUSION, FRAMEWORK, OURS = "2604.22782", "2512.03870", "2410.14442", "ours"
Numbers = dict[tuple[str, float | None], np.ndarray]  # (run, share of the cache) -> one number per seed


@dataclass
class Study:
    title: str
    text: str
    recipes: dict[str, str]  # column -> settings of train.py that all runs of it share
    runs: dict[str, str]  # name -> what else train.py is given; {seed} is the seed
    claims: dict[str, tuple[str, str, Callable]]  # key -> source, sentence, effect(numbers, column) by seed
    shares: tuple[float | None, ...] = (None,)  # of the cache, each run as suits it best; None: its own plan
    measure: Callable = measures.loss  # (run's folder, share) -> a number
    prepare: Callable[[], None] = lambda: None  # makes what the runs start from
    seeds: tuple[int, ...] = (0, 1, 2)


# --- the studies ------------------------------------------------------------------------------------------

RECIPE = "config/demo.toml --n_kv_head=4 --max_iters=600 --eval_interval=200"
SIZES = {
    "600 steps": RECIPE,
    "2,400 steps": f"{RECIPE} --max_iters=2400",
    "7.48 M": f"{RECIPE} --n_embd=256",
}
STOCHASTIC, SHARED = "--router_p=0.5", "--plan=shared-v --router_p=0.3 --router_lowest=1"
FLEXIBLE = {"normal": "", "stochastic": STOCHASTIC, "stochastic shared-v": SHARED}
HALF = {"CLA-2": "--plan=cla:2", "YOCO": "--plan=yoco", "GQA": "--n_kv_head=2", "FusedKV-Lite": "--plan=fusedkv-lite"}
NINE = [f"{shape}-{target}" for shape in SHAPES for target in ("bottom", "middle", "top")]
UPPER = {f"K of layer {k}, V of layer {v}": "--plan=0_1_2_3" + 4 * f"_k{k}v{v}" for k in (3, 0) for v in (0, 3)}


def less(better: str, worse: str, at: float | None = None, than_at: float | None = None) -> Callable:
    """The effect of a claim that one run has a lower loss than another, at shares of the cache."""
    return lambda x, column: x[worse, than_at or at] - x[better, at]


def loses_less(share: float) -> Callable:
    """The effect of a claim that a stochastic model loses less than a normal one within a share of the cache."""

    def effect(x: Numbers, column: str) -> np.ndarray:
        normal, stochastic = (x[run, share] - x[run, 1] for run in ("normal", "stochastic"))
        return normal - stochastic

    return effect


CACHE = Study(
    "Cache against loss",
    "Within each share of the cache every run is deployed under the plan, out of a few, that has the lowest loss on "
    "training text (`measures.deployed`). *Stochastic* is the rule of 2604.22782 with p = 0.5. *Shared-v* gives V of "
    "layer 0 to all layers, as SVFormer (2410.17897) does: 56.2% of a full cache. *Stochastic shared-v* also draws K "
    "of layer 1 and up, with p = 0.3, and is trained for 18.8% of a full cache or more.",
    SIZES,
    FLEXIBLE | {"shared-v, not routed": "--plan=shared-v", "FusedKV": "--plan=fusedkv"},
    {
        "price": (OURS, "Stochastic routing has a price at the full cache", less("normal", "stochastic", 1)),
        "half": (ROUTING, "A normal model gets worse with half the cache", less("normal", "normal", 1, 0.5)),
        "half less": (ROUTING, "A stochastic model loses less with half the cache", loses_less(0.5)),
        "quarter": (ROUTING, "A normal model gets worse with a quarter of the cache", less("normal", "normal", 1, 0.25)),
        "quarter less": (ROUTING, "A stochastic model loses less with a quarter of the cache", loses_less(0.25)),
        "shared half": (OURS, "Stochastic shared-v with half the cache beats a normal model with all of it",
                        less("stochastic shared-v", "normal", 0.5, 1)),
        "shared quarter": (OURS, "Stochastic shared-v with a quarter of the cache beats a normal model with all of it",
                           less("stochastic shared-v", "normal", 0.25, 1)),
        "shared": (OURS, "With half the cache stochastic shared-v beats stochastic routing",
                   less("stochastic shared-v", "stochastic", 0.5)),
        "routed": (OURS, "Routing costs shared-v loss where all its cache is kept",
                   less("shared-v, not routed", "stochastic shared-v", 1)),
        "fusedkv": (FUSION, "FusedKV beats a normal model with all its cache", less("FusedKV", "normal", 0.5, 1)),
    },
    (1, 0.5, 0.25, 0.1875, 0.125),
)  # fmt: skip

SINGLE = {  # the best models that are trained for one plan
    "own K, V of layer 0 (`shared-v`)": "--plan=shared-v",
    "K of 7 layers, V of layer 0": f"--plan={measures.few_keys(0.5)}",
    "FusedKV": "--plan=fusedkv",
    "K of 3 layers, V of layer 0": f"--plan={measures.few_keys(0.25)}",
    "CLA-4": "--plan=cla:4",
    "K of 2 layers, V of layer 0": f"--plan={measures.few_keys(0.1875)}",
}


def near_best(x: Numbers, column: str) -> np.ndarray:
    share = float(column.rstrip("%")) / 100
    best = min((x[name, share] for name in SINGLE if (name, share) in x), key=np.mean)
    return 1.01 * best - x["stochastic shared-v", share]


STUDIES = {
    "cache": CACHE,
    "shakespeare": replace(
        CACHE,
        title="On Shakespeare",
        text="The same on bytes of Shakespeare, with `config/shakespeare.toml` (4 layers, 2,000 steps). There neither "
        "`shared-v` nor FusedKV is better than the normal model.",
        recipes={"Shakespeare": "config/shakespeare.toml"},
        shares=(1, 0.5, 0.375, 0.25),
    ),
    "dedicated": Study(
        "Against models for one plan",
        "Models that are trained for one plan hardly need their cache at this size: what a normal model loses without "
        "it, it loses for not having been trained so.",
        dict.fromkeys(("100%", "50%", "25%", "18.75%"), RECIPE),
        SINGLE | {"stochastic shared-v": SHARED},
        {"near": (OURS, "Stochastic shared-v is within 1% of the best model for one plan of that size", near_best)},
        (1, 0.5, 0.25, 0.1875),
    ),
    "recall": Study(
        "Associative recall",
        "The share of values that a model gives back when its context pairs them with keys, over 2 to 24 pairs "
        "(`measures.recall`); guessing a value of the context is right in 0.23. A third of the corpus is Python "
        "source, the rest puzzles.",
        {"": "--n_embd=64 --dataset=recall --n_kv_head=4 --batch_size=32 --block_size=128 --max_iters=1500 "
         "--warmup_iters=40 --learning_rate=2e-3 --min_lr=2e-4 --eval_interval=200"},
        FLEXIBLE | {
            "stochastic, p = 0.3": "--router_p=0.3",
            "stochastic, p = 0.3, layer 0 never drawn": "--router_p=0.3 --router_lowest=1",
            "stochastic shared-v, K of layer 0 drawn too": "--plan=shared-v --router_p=0.3",
        },
        {
            "quarter": (ROUTING, "A normal model recalls less with a quarter of the cache",
                        lambda x, _: x["normal", 1] - x["normal", 0.25]),
            "price": (OURS, "Stochastic routing costs recall at the full cache",
                      lambda x, _: x["normal", 1] - x["stochastic", 1]),
            "shared": (OURS, "V of layer 0 for all layers brings recall back",
                       lambda x, _: x["stochastic shared-v", 1] - x["stochastic", 1]),
            "lowest": (OURS, "With p = 0.3, never drawing layer 0 brings recall back",
                       lambda x, _: x["stochastic, p = 0.3, layer 0 never drawn", 1] - x["stochastic, p = 0.3", 1]),
        },
        (1, 0.5, 0.25, 0.1875),
        measure=measures.recall,
        prepare=measures.make_recall_corpus,
    ),
    "sources": Study(
        "Keys and values are not alike",
        "What the upper half of the layers reads, one source each; layer 3 is the highest that stores.",
        dict.fromkeys(list(UPPER)[1:], RECIPE),
        UPPER,
        {"lite": (FUSION, "Middle K with bottom V (FusedKV-Lite) is better than",
                  lambda x, column: x[column, None] - x["K of layer 3, V of layer 0", None])},
    ),
    "fusion": Study(
        "FusedKV against the rest",
        "Models of 689 k and 2.13 M parameters, at equal tokens and, but for the first row, half the cache.",
        {"689 k": f"{RECIPE} --n_embd=64", "2.13 M": RECIPE},
        {"full cache": ""} | HALF | {"FusedKV": "--plan=fusedkv"},
        {f"{a} {b}": (FUSION, f"{a} is better than {b}", less(a, b))
         for a, b in (("FusedKV", "full cache"), ("FusedKV-Lite", "full cache"), ("FusedKV", "FusedKV-Lite"),
                      ("FusedKV-Lite", "CLA-2"), ("FusedKV-Lite", "YOCO"), ("FusedKV-Lite", "GQA"))},
    ),
    "framework": Study(
        "The nine configurations",
        "At half and at a quarter of the cache (4 and 2 of 8 layers); configurations that are the plan of an earlier "
        "one are left out. Those with middle and top are cyclic but for lasagna-middle:4.",
        dict.fromkeys([name for name in NINE if name != "lasagna-middle"], RECIPE),
        {"full": ""} | {f"{name}:{n}": f"--plan={name}:{n}" for n in (4, 2) for name in NINE
                        if (name, n) != ("lasagna-middle", 4) and (not name.startswith("sandwich") or n == 4)},
        {"near": (FRAMEWORK, "With half the cache a configuration is within 1% of the full one",
                  lambda x, column: 1.01 * x["full", None] - x[f"{column}:4", None])},
    ),
    "finetune": Study(
        "Fine-tuning for sharing",
        "Normal models, fine-tuned on 51.2 k to 307 k tokens with p = 0.3, on text of the same corpus in another order; the learning rate, with "
        "shared-v four times the others', was chosen on one seed.",
        {tokens: f"{RECIPE} --init_from=hf:out/studies/normal-{{seed}} --max_iters={n} --warmup_iters={n // 8}"
         for tokens, n in (("51.2 k", 50), ("154 k", 150), ("307 k", 300))},
        {
            "not routed": "--learning_rate=5e-4 --min_lr=5e-5",
            "stochastic": "--learning_rate=5e-4 --min_lr=5e-5 --router_p=0.3",
            "stochastic shared-v": f"--learning_rate=2e-3 --min_lr=2e-4 {SHARED}",
        },
        {
            "quarter": (ROUTING, "Fine-tuning with routing helps a quarter of the cache",
                        less("stochastic", "not routed", 0.25)),
            "price": (OURS, "Fine-tuning with routing costs loss at the full cache", less("not routed", "stochastic", 1)),
            "shared": (OURS, "Fine-tuning as stochastic shared-v helps a quarter more",
                       less("stochastic shared-v", "stochastic", 0.25)),
        },
        (1, 0.5, 0.25),
        prepare=lambda: measures.export_normal([folder(RECIPE, "", seed) for seed in (0, 1, 2)]),
        seeds=(3, 4, 5),
    ),
    "regulariser": Study(
        "A regulariser when data is short",
        "The lowest held-out loss over 32,768 tokens, read about 19 times.",
        dict.fromkeys(("p = 0.1", "p = 0.2", "p = 0.3"), f"{RECIPE} --dataset=python-short --eval_interval=50"),
        {"normal": ""} | {f"p = {p}": f"--router_p={p}" for p in (0.1, 0.2, 0.3)},
        {"short": (ROUTING, "Routing helps on short data", lambda x, column: x["normal", None] - x[column, None])},
        measure=measures.lowest_loss,
        prepare=measures.make_short_corpus,
    ),
}  # fmt: skip


# --- training and measuring -------------------------------------------------------------------------------


def folder(recipe: str, settings: str, seed: int) -> Path:
    return RUNS / re.sub(r"[^\w.+]+", "-", f"{recipe} {settings} {seed}").strip("-")


def train(out: Path, words: list[str]) -> None:
    """Train one run, or go on with it where it was stopped."""
    if (out / "finished").exists():
        return
    print(f"--- {out}", flush=True)
    start = ["--init_from=resume"] if any(out.glob("*.pt")) else []
    with subprocess.Popen([sys.executable, "train.py", *words, f"--out_dir={out}", *start]) as child:
        try:
            child.wait()
        except KeyboardInterrupt:  # the run has heard it too, and saves
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            child.wait()
    if child.returncode:
        sys.exit(child.returncode)
    (out / "finished").touch()


def measured(study: Study, out: Path, share: float | None) -> float | None:
    """What a run comes to within a share of the cache, or None where it has no such plan. Kept with the run."""
    path, key = out / "measured.json", f"{study.measure.__name__} {share}"
    known = read_json(path, "delete it") if path.exists() else {}
    if key not in known:
        known[key] = study.measure(out, share)
        replace_file(path, json.dumps(known).encode())
    return known[key]


def conduct(study: Study) -> dict:
    """Train and measure a study: its numbers, [mean, standard deviation] by column, run and share, its claims,
    [effect, margin] by column and key, and where they come from."""
    study.prepare()
    numbers, claims, outs = {}, {}, {}
    for column, recipe in study.recipes.items():
        x: Numbers = {}
        for run, settings in study.runs.items():
            for seed in study.seeds:
                out = outs[run, column, seed] = folder(recipe, settings, seed)
                train(out, f"{recipe} {settings} --seed={seed}".format(seed=seed).split())
            for share in study.shares:
                found = [measured(study, outs[run, column, seed], share) for seed in study.seeds]
                if None not in found:
                    x[run, share] = np.array(found)
        table = numbers.setdefault(column, {})
        for (run, share), values in x.items():
            table.setdefault(run, {})[str(share)] = [round(mean(values), 6), round(stdev(values), 6)]
        claims[column] = {}
        for key, (_, _, effect) in study.claims.items():
            values = effect(x, column)
            margin = T_95 * stdev(values) / len(values) ** 0.5
            claims[column][key] = [round(mean(values), 6), round(margin, 6)]
    return {"provenance": provenance(set(outs.values())), "numbers": numbers, "claims": claims}


def provenance(outs: set[Path]) -> str:
    about = [read_json(out / "run.json", "train the run again") for out in outs]
    spent = sum(read_lines(out / "log.jsonl", "train the run again")[-1]["time"] for out in outs)
    facts = ("; ".join(sorted({str(run[key]) for run in about})) for key in ("commit", "device", "dtype", "torch"))
    return f"{len(outs)} runs of {duration(spent)}; commit " + ", ".join(facts)


# --- RESULTS.md -------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in [header, *rows])
    return "\n".join([first, "|---" * len(header) + "|", *others])


def pm(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"  # some were carried over


def percent(share: str) -> str:
    return "loss" if share == "None" else f"{100 * float(share):.3g}%"


def tables(study: Study, found: dict) -> dict[str, dict]:
    """The numbers of every column, once where columns have the same recipe."""
    first = {recipe: column for column, recipe in reversed(study.recipes.items())}
    return {column: found["numbers"][column] for column in study.recipes if column in first.values()}


def section(name: str, study: Study, found: dict) -> str:
    """A study's part of RESULTS.md: what it is, a table for every recipe, and a picture, which is drawn."""
    parts = [f"## {study.title}", study.text, f"`python -m lab.studies {name}`: {found['provenance']}."]
    several = tables(study, found)
    with picture(RESULTS / f"{name}.png", len(several), width=4.5, squeeze=False) as axes:
        for ax, (column, x) in zip(axes[0], several.items()):
            title = column if len(several) > 1 else ""
            shares = [str(share) for share in study.shares if any(str(share) in row for row in x.values())]
            rows = [[run, *(pm(*row[s]) if s in row else "" for s in shares)] for run, row in x.items()]
            parts.append(markdown([title, *map(percent, shares)], rows))
            (draw_lines if len(shares) > 1 else draw_marks)(ax, x)
            ax.set_title(title or study.title)
    parts += [found["note"]] if "note" in found else []
    return "\n\n".join([*parts, f"![{study.title}](results/{name}.png)"])


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
    means, deviations = zip(*(row["None"] for row in x.values()))
    ax.errorbar(means, range(len(x)), xerr=deviations, fmt="o", color=STYLES[0][2], capsize=3)
    ax.set_yticks(range(len(x)), list(x), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("held-out loss, nats per token")
    ax.grid(alpha=0.25)


def claims_table(found: dict[str, dict]) -> str:
    """A row for every claim, with its effect in every column of every study that makes it. It appeared if its 95%
    interval lies above zero, is opposite if that lies below, and is not shown otherwise."""
    effects, rows = {}, []
    for name, numbers in found.items():
        for column, claims in numbers["claims"].items():
            for key, pair in claims.items():
                effects.setdefault(STUDIES[name].claims[key][:2], {})[column] = pair
    for (source, sentence), by_column in effects.items():
        cells = [f"{column} {effect:+.3f} ± {margin:.3f}".strip() for column, (effect, margin) in by_column.items()]
        words = []
        for effect, margin in by_column.values():
            words.append("not shown" if abs(effect) <= margin else "appeared" if effect > 0 else "opposite")
        words = words[:1] if len(set(words)) == 1 else words
        rows.append([source, sentence, "; ".join(cells), ", ".join(words)])
    return markdown(["source", "claim", "effect, with its 95% interval", "verdict"], rows)


def write_results() -> None:
    """RESULTS.md and its pictures, from the numbers in results/ and the text around them in results/README.md."""
    found = {name: RESULTS / f"{name}.json" for name in STUDIES}
    found = {name: read_json(path, "run the study") for name, path in found.items() if path.exists()}
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
        path = RESULTS / f"{name}.json"
        if not path.exists():
            replace_file(path, json.dumps(conduct(STUDIES[name]), indent=1).encode() + b"\n")
    write_results()


if __name__ == "__main__":
    cli.run(main)
