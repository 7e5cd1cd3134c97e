"""The papers' claims in miniature. Runs that are done are not done again, and those that were stopped go on.

python -m lab.studies cache          one study; its section goes into RESULTS.md
python -m lab.studies all            every one of them (make results)
python -m lab.studies train VARIANT config/demo.toml --out_dir=...     train.py with a variation
"""

import importlib
import sys
from pathlib import Path

import cli
import train
from cli import Parser, UserError
from lab.studies.report import CLAIMS, keep, markdown, write_results
from lab.studies.variants import VARIANTS
from lab.studies.workbench import Workbench

STUDIES = {  # module -> title
    "cache": "Cache against loss",
    "scale": "Longer and larger",
    "price": "The price of flexibility",
    "dedicated": "Against models for one plan",
    "induction": "Induction",
    "recall": "Associative recall",
    "keys_values": "Keys and values are not alike",
    "fusion": "FusedKV against the rest",
    "regulariser": "A regulariser when data is short",
    "framework": "The nine configurations",
    "accuracy": "Accuracy by plan",
    "finetune": "Fine-tuning for sharing",
}

SETS = {
    "cpu": Workbench(
        "cpu",
        Path("out/studies"),
        "config/demo.toml --n_kv_head=4 --max_iters=600 --eval_interval=200".split(),
        narrow="--n_embd=64", wide="--n_embd=256", n_layer=8, steps=600,
    ),
    "gpu": Workbench(
        "gpu",
        Path("out/studies-gpu"),
        "config/demo.toml --n_embd=256 --n_kv_head=4 --batch_size=64 --max_iters=600 --warmup_iters=60 "
        "--eval_interval=200 --eval_iters=2".split(),
        narrow="--n_embd=128", wide="--n_embd=512", n_layer=8, steps=600,
    ),
    "shakespeare": Workbench(
        "shakespeare",
        Path("out/studies-shakespeare"),
        ["config/shakespeare.toml"],
        narrow="--n_embd=64", wide="--n_embd=256", n_layer=4, steps=2000,
    ),
}  # fmt: skip


def train_variant() -> None:
    name = sys.argv[2] if len(sys.argv) > 2 else ""
    if name not in VARIANTS:
        raise UserError(f"no variation {name!r}; valid are {', '.join(VARIANTS)}")
    del sys.argv[1:3]
    train.main(**VARIANTS[name])


def main():
    if sys.argv[1:2] == ["train"]:
        train_variant()
        return
    parser = Parser(__doc__)
    parser.add_argument("study", choices=[*STUDIES, "all"], help="which one to run")
    parser.add_argument("--set", default="cpu", choices=SETS, help="of models, corpus and sizes [cpu]")
    args = parser.parse_args()
    bench = SETS[args.set]
    for name in STUDIES if args.study == "all" else [args.study]:
        print(f"--- {STUDIES[name]}", flush=True)
        bench.used.clear()
        section = importlib.import_module(f"lab.studies.{name}").study(bench)
        keep(bench, name, section)
        print(markdown(CLAIMS[1:], [claim.row() for claim in section.claims]), flush=True)
    write_results(
        bench, STUDIES, Path("RESULTS.md" if bench.name == "cpu" else f"RESULTS_{bench.name.upper()}.md")
    )


if __name__ == "__main__":
    cli.run(main)
