"""What the studies measure of a run within a share of the cache, and the corpora and folders that they start
from."""

import random
import string
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import data
from kv_router import Plan, PlanError, Route
from model import GPT
from support.cli import read_json
from support.devices import autocast, pick_device, pick_dtype
from support.runs import load_run, window_losses
from sweep import sharing, spread

import torch

PAIRS = (2, 4, 8, 16, 24)
KEYS, VALUES = string.ascii_lowercase, string.ascii_uppercase


# --- plans within a share of the cache --------------------------------------------------------------------


def evenly(n_layer: int, n_kept: int, lowest: int) -> Plan:
    """A plan that keeps n_kept layers: 0 to `lowest`, and above that evenly spread ones."""
    lowest = lowest if n_kept > lowest else 0  # a budget too small for what the model was trained to keep
    return sharing(Plan.parse("full", n_layer), spread(n_layer, n_kept, lowest))


def deployments(n_layer: int, share: float, lowest: int = 0) -> list[str]:
    """Ways to spend a share of the cache: keep K and V of evenly spread layers, and let the others read the
    nearest kept layer below, or its K with V of layer 0; or store V of layer 0 alone, and K of more
    layers."""
    # Three ways to spend the same bytes; the best on training text is deployed.
    kept = evenly(n_layer, max(1, int(n_layer * share)), lowest)
    bottom_v = [r if r.k == (i,) else Route(r.k, (0,)) for i, r in enumerate(kept.routes)]
    n_keys = max(1, min(n_layer, int(2 * n_layer * share) - 1))
    keys_only = [Route(r.k, (0,)) for r in evenly(n_layer, n_keys, lowest).routes]
    return list(dict.fromkeys(p.spec for p in (kept, Plan(tuple(bottom_v)), Plan(tuple(keys_only)))))


@cache
def opened(out: Path) -> tuple[GPT, dict[str, data.Tokens], partial]:
    """A run's model, its corpus, and what its losses are computed in."""
    device = pick_device("auto")
    model, config = load_run(out, device)
    corpus = Path(config.data_dir) / config.dataset
    tokens = {split: data.Tokens(corpus, split, config.block_size) for split in ("train", "val")}
    return model, tokens, partial(autocast, device, pick_dtype(config.dtype, device)[0])


def deployed(out: Path, share: float | None) -> Plan | None:
    """The plan that has the lowest loss on training text, so that held-out text does not choose, among those
    within a share of the cache that a run's model can have; or its own plan."""
    model, tokens, context = opened(out)
    if share is None:
        return model.plan
    fitting = [model.plan] if model.plan.cache_ratio <= share else []
    for x in {share, *(x for x in (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125) if x < share)}:
        for spec in deployments(len(model.plan), x, model.config.router_lowest):
            with suppress(PlanError):
                fitting.append(model.resolve(spec))
    fitting = [plan for plan in dict.fromkeys(fitting) if plan.cache_ratio <= share]
    if any(len(route.k + route.v) > 2 for route in model.plan.routes):  # a model that fuses has one plan
        fitting = [plan for plan in fitting if plan == model.plan]
    return min(fitting, key=lambda plan: loss_under(plan, out, "train", 16), default=None)


# --- measures ---------------------------------------------------------------------------------------------


def loss_under(plan: Plan, out: Path, split: str = "val", n: int = 64) -> float:
    model, tokens, context = opened(out)
    return float(window_losses(model, tokens[split], n, 16, plan, context).mean())


def loss(out: Path, share: float | None) -> float | None:
    """The loss in nats per token on 64 held-out windows, within a share of the cache."""
    plan = deployed(out, share)
    return plan and loss_under(plan, out)


def lowest_loss(out: Path, share: None) -> float:
    """The lowest loss of a run's evaluations after step 0."""
    rows = read_json(out / "log.jsonl", "train the run again", lines=True)
    return min(row["val_loss"] for row in rows if "val_loss" in row and row["step"])


def puzzle(rng: random.Random, n_pairs: int, n_questions: int) -> str:
    """Multi-query associative recall (Arora et al. 2023), such as aXbYcZbYaXbY: each key with its value, and
    then some of them again. Only the context says which value belongs to a key."""
    pairs = [key + rng.choice(VALUES) for key in rng.sample(KEYS, n_pairs)]
    return "".join(pairs + rng.choices(pairs, k=n_questions))


@torch.no_grad()
def recall(out: Path, share: float | None, n: int = 100) -> float | None:
    """The share of values that a model predicts, in the mean over n puzzles of each number of PAIRS."""
    plan, (model, tokens, _) = deployed(out, share), opened(out)
    enc, rng, right = data.load_tokenizer(tokens["val"].path.parent), random.Random(1), []
    for n_pairs in PAIRS:
        texts = [puzzle(rng, n_pairs, n_pairs) for _ in range(n)]
        idx = torch.tensor([[enc.eot_token, *enc.encode_ordinary(text)] for text in texts])
        idx = idx.to(model.embed.weight.device)
        guesses = model.logits(idx[:, :-1], plan).argmax(-1)
        right.append(float((guesses == idx[:, 1:])[:, 2 * n_pairs + 1 :: 2].float().mean()))
    return plan and sum(right) / len(right)


# --- corpora ----------------------------------------------------------------------------------------------


def recall_documents(size: int = 1_000_000) -> Iterator[str]:
    """Pieces of Python source, `size` characters in all, each followed by two puzzles. Puzzles alone are not
    learned in a few million tokens: it takes heads that look at the previous token, for which text is the
    better teacher."""
    rng = random.Random(0)
    for path in data.python_corpus():
        text = data.read_text(path)[:size]
        size -= len(text)
        for start in range(0, len(text), 100):
            yield text[start : start + 100]
            yield from (puzzle(rng, n_pairs, 3 * n_pairs) for n_pairs in rng.choices(PAIRS, k=2))


def make_recall_corpus() -> None:
    if not Path("data/recall").exists():
        data.prepare(Path("data/recall"), recall_documents, "bytes", "Python source and puzzles")


def make_short_corpus() -> None:
    """data/python-short: about 32,768 tokens of the default corpus."""
    if not Path("data/python-short").exists():
        text = "".join(data.read_text(path) for path in data.python_corpus()[:20])[: 3 << 15]
        data.prepare(Path("data/python-short"), lambda: [text], "bpe:4096", "the first files of python")
