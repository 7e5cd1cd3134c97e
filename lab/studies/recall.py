"""Multi-query associative recall (Arora et al. 2023): pairs of a key and a value, and then the keys again in
random order. Only the context says which value belongs to a key, so here sharing should hurt first."""

import random
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
from lab.studies.cache import FLEXIBLE, NORMAL, PAPER, SHARED
from lab.studies.deploy import deployed
from lab.studies.price import FROM_0, FROM_1, SHARED_FROM_0
from lab.studies.report import OURS, ROUTING, Claim, Section, markdown, mean_std, percent
from lab.studies.workbench import Workbench, seeded
from plots import line, picture

KEYS, VALUES = string.ascii_lowercase, string.ascii_uppercase
PAIRS = (2, 4, 8, 16, 24)
ONE_PLAN = "--plan=cla:4"
TEXT = 1_000_000  # characters of text in the corpus, and more than that of puzzles


def puzzle(rng: random.Random, n_pairs: int, n_questions: int) -> str:
    """Such as aXbYcZbYaXbY: each key with its value, and then some of them again, drawn at random."""
    pairs = [key + rng.choice(VALUES) for key in rng.sample(KEYS, n_pairs)]
    return "".join(pairs + rng.choices(pairs, k=n_questions))


def documents() -> Iterator[str]:
    """Pieces of Python source, each followed by two puzzles. Puzzles alone are not learned in a few million
    tokens: it takes heads that look at the previous token, for which text is the better teacher."""
    rng, left = random.Random(0), TEXT
    for path in data.python_corpus():
        text = data.read_text(path)[:left]
        left -= len(text)
        for start in range(0, len(text), 100):
            yield text[start : start + 100]
            for _ in range(2):
                n_pairs = rng.choice(PAIRS)
                yield puzzle(rng, n_pairs, 3 * n_pairs)


@torch.no_grad()
def accuracies(bench: Workbench, run: str, plan: str, n: int = 100) -> np.ndarray:
    """How many of the values that are asked for a run's model predicts, for every number of PAIRS."""

    def measure():
        model, tokens = bench.load(run)
        enc, rng = data.load_tokenizer(tokens.path.parent), random.Random(1)
        for n_pairs in PAIRS:
            texts = [puzzle(rng, n_pairs, n_pairs) for _ in range(n)]
            idx = torch.tensor([[enc.eot_token, *enc.encode_ordinary(text)] for text in texts])
            idx = idx.to(model.embed.weight.device)
            guesses = model.logits(idx[:, :-1], plan).argmax(-1)
            yield (guesses == idx[:, 1:])[:, 2 * n_pairs + 1 :: 2].float().mean()

    return bench.measured(run, f"recall {plan} {n}", measure)


def study(bench: Workbench) -> Section:
    if not (Path("data") / "recall").exists():
        data.prepare(Path("data") / "recall", documents, "bytes", "Python source and puzzles")
    n_steps = 5 * bench.steps // 2
    recipe = f"{bench.narrow} --dataset=recall --batch_size=32 --block_size=128 --max_iters={n_steps}"
    recipe += " --learning_rate=2e-3 --min_lr=2e-4"
    models = FLEXIBLE | {
        "stochastic, p = 0.3": FROM_0,
        "stochastic, p = 0.3, layer 0 never drawn": FROM_1,
        "stochastic shared-v, K of layer 0 drawn too": SHARED_FROM_0,
        "for one plan, CLA-4": ONE_PLAN,
    }
    runs = {name: f"{recipe} {settings}".strip() for name, settings in models.items()}
    bench.train(run for settings in runs.values() for run in seeded(settings))
    rows, right = [], {}
    with picture(bench.pictures / "recall.png", columns=2, sharey=True) as axes:
        for name, settings in runs.items():
            for share in [0.25] if models[name] == ONE_PLAN else bench.shares:
                found = [accuracies(bench, run, deployed(bench, run, share)) for run in seeded(settings)]
                found = np.array(found)  # (seeds, PAIRS)
                right[models[name], share] = found
                rows.append([name, percent(share), *map(mean_std, found.T)])
        for ax, share in zip(axes, (1, 0.25)):
            for i, (name, settings) in enumerate(models.items()):
                if (settings, share) in right:
                    line(ax, PAIRS, right[settings, share].mean(0), i, name)
            ax.set(title=f"cache {percent(share)}", xlabel="pairs", xticks=PAIRS)
        axes[0].set_ylabel("values recalled")
    normal, paper, shared = ({s: right[m, s].mean(1) for s in bench.shares} for m in (NORMAL, PAPER, SHARED))
    from_0, from_1, drawn = (right[settings, 1].mean(1) for settings in (FROM_0, FROM_1, SHARED_FROM_0))
    loss, routed_loss, price = normal[1] - normal[0.25], paper[1] - paper[0.25], normal[1] - paper[1]
    claims = [
        Claim(ROUTING, "A normal model recalls less with a quarter of the cache", loss, "of values"),
        Claim(ROUTING, "A stochastic model loses less recall", loss - routed_loss, "of values"),
        Claim(OURS, "Stochastic routing costs recall at the full cache", price, "of values"),
        Claim(OURS, "Stochastic shared-v recalls more at the full cache", shared[1] - paper[1], "of values"),
        Claim(OURS, "With p = 0.3, not drawing layer 0 brings recall", from_1 - from_0, "of values"),
        Claim(OURS, "With p = 0.3, V of layer 0 for all brings recall", drawn - from_0, "of values"),
    ]
    shown = [f"{x[1].mean():.0%} ({x[0.25].mean():.0%} with a quarter)" for x in (normal, paper, shared)]
    summary = f"""Asked for the value that its context pairs with a key, a normal model answers right in
{shown[0]}, a stochastic one in {shown[1]}, and a stochastic shared-v one in {shown[2]}."""
    # Values are drawn with replacement: one that belongs to another pair is right, too, once in 26 times.
    by_chance = ", ".join(f"{1 / n + (1 - 1 / n) / len(VALUES):.2f}" for n in PAIRS)
    text = f"""The share of right answers, over 100 puzzles for each number of pairs, each with as many
questions as pairs. Guessing any letter is right in 0.04, and guessing a value of the context in {by_chance}.
Each model is trained with `{recipe}`.
A third of that corpus is Python source, the rest puzzles.

"""
    header = ["trained", "cache", *(f"{n} pairs" for n in PAIRS)]
    return Section(
        claims, text + markdown(header, rows) + "\n![values recalled](PICTURES/recall.png)\n", summary
    )
