"""lab.studies: its variations, against what they say they are; every study, from runs to RESULTS.md."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from runs import load_run, window_losses

import data
import lab.studies.__main__ as main
from kv_router import Plan, StochasticRouter, both_of
from lab.studies import framework, induction, recall, variants, workbench
from lab.studies.deploy import deployments
from lab.studies.report import Claim
from lab.studies.variants import VARIANTS, BeforeRope, Even, Untied
from lab.studies.workbench import Workbench, seeded
from model import GPT, SequenceKV
from sweep import sharing, spread


@pytest.mark.parametrize("name", [name for name, arguments in VARIANTS.items() if "rule" in arguments])
def test_rules_draw_what_they_say(name):
    router = StochasticRouter(8, 0.5, seed=3, **VARIANTS[name])
    plans = [router.plan(step) for step in range(400)]
    assert plans == [router.plan(step) for step in range(400)]
    if name == "rungs":
        assert set(plans) == {sharing(Plan.parse("full", 8), spread(8, n)) for n in range(1, 9)}
        return
    assert len(set(plans)) > 50
    assert all(
        route in [both_of(j) for j in range(i + 1)] for plan in plans for i, route in enumerate(plan.routes)
    )


def test_falling_ends_and_rising_starts_with_the_full_plan():
    falling, rising = (StochasticRouter(8, 0.5, seed=3, **VARIANTS[name]) for name in ("falling", "rising"))
    assert rising.plan(0).spec == falling.plan(600).spec == "full"
    for first, last in ((rising.plan(20), rising.plan(599)), (falling.plan(580), falling.plan(1))):
        moved = [sum(route != both_of(i) for i, route in enumerate(plan.routes)) for plan in (first, last)]
        assert moved[0] < moved[1]


def test_fusion_variants():
    """With tied gates `Untied` is FusedKV; `BeforeRope` rotates the sum of unrotated keys; `Even` is even."""
    tied = make_model("fusedkv", n_layer=4)
    idx = torch.randint(61, (2, 16))
    model, before = (kind(tied.config) for kind in (Untied, BeforeRope))
    weights = tied.state_dict()
    weights |= {n: torch.cat((g, g), -1) for n, g in weights.items() if n.endswith("k_gate")}
    model.load_state_dict(weights)
    torch.testing.assert_close(model.logits(idx), tied.logits(idx))
    # With equal gates for both features of a pair, rotating before or after makes no difference.
    before.load_state_dict(weights)
    torch.testing.assert_close(before.logits(idx), tied.logits(idx), rtol=1e-4, atol=1e-4)
    before.blocks[3].attn.k_gate.data.normal_()
    model.load_state_dict(before.state_dict())
    assert (before.logits(idx) - model.logits(idx)).abs().max() > 1e-3
    assert all((block.attn.k_gate == 0.5).all() for block in Even(tied.config).blocks[2:])


def test_attention_weights_are_those_of_the_model():
    model, plan = make_model("shared-v", n_layer=4, n_kv_head=2), Plan.parse("0_k1v0_k1v0_k3v0", 4)
    idx = torch.randint(61, (1, 16))
    weights = induction.attention_weights(model, idx, plan)
    assert weights.shape == (4, 4, 16, 16) and not weights.triu(1).any()
    kv = SequenceKV(plan)
    kv.rope = model.rope(torch.arange(16))
    x = model.embed(idx)
    for i, block in enumerate(model.blocks):
        q = model.project(i, x, kv)
        ks, vs = kv.sources(i)
        v = vs[0].repeat_interleave(2, dim=1)
        mixed = block.attn.o_proj((weights[i] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, block.attn(q, ks, vs, False, None))
        x = block(x, q, ks, vs, False)


def test_induction_scores_find_a_head_that_looks_back(monkeypatch):
    """Of two heads, one looks at what followed the current token in the first copy, and one at itself."""
    L = induction.LENGTH
    position = torch.arange(2 * L)
    heads = torch.zeros(1, 2, 2 * L, 2 * L)
    heads[0, 0, position, (position - L + 1).clamp(0)] = 1
    heads[0, 1, position, position] = 1
    monkeypatch.setattr(induction, "attention_weights", lambda *_: heads)
    assert induction.induction_scores(None, None, None).tolist() == [[1, 0]]


def test_puzzles_ask_for_pairs_that_they_gave():
    text = recall.puzzle(random.Random(0), 8, 40)
    pairs = [*zip(text[::2], text[1::2])]
    assert len(pairs) == 48 and len(dict(pairs[:8])) == 8 and set(pairs[8:]) == set(pairs[:8])
    assert text.isalpha() and text[::2].islower() and text[1::2].isupper()


def test_recall_counts_the_values_that_are_asked_for(bench, monkeypatch):
    """A model that always knows the next token recalls all, and one that guesses a single letter few."""
    recall.data.prepare(Path("data/recall"), recall.documents, "bytes", "test")
    tokens = data.Tokens("data/recall", "val", 128)

    class Knows:
        embed = torch.nn.Embedding(257, 2)

        def logits(self, idx, plan):
            seen, guess = [{} for _ in idx], torch.zeros(idx.shape, dtype=torch.long)
            for row, ids in enumerate(idx.tolist()):
                for t, (key, value) in enumerate(zip(ids, [*ids[1:], None])):
                    guess[row, t] = seen[row].get(key, 0)
                    seen[row].setdefault(key, value)
            return torch.nn.functional.one_hot(guess, 257)

    monkeypatch.setattr(Workbench, "load", lambda *_: (Knows(), tokens))
    monkeypatch.setattr(Workbench, "measured", lambda self, run, key, measure: np.array(list(measure())))
    assert recall.accuracies(bench, "", "full", n=3).tolist() == [1] * len(recall.PAIRS)
    monkeypatch.setattr(Knows, "logits", lambda self, idx, plan: torch.eye(257)[65].expand(*idx.shape, 257))
    assert recall.accuracies(bench, "", "full", n=50).max() < 0.1


def test_deployments_fit_their_share():
    for share in (0.75, 0.5, 0.25, 0.1875, 0.125):
        for lowest in (0, 1, 2):
            for spec in deployments(8, share, lowest):
                plan = Plan.parse(spec, 8)
                assert plan.cache_ratio <= share, (share, lowest, spec)
                if len(plan.k_layers) > lowest:
                    assert all(r.k == (i,) or r.k[0] >= lowest for i, r in enumerate(plan.routes)), spec


def test_verdicts_follow_from_the_spread_over_seeds():
    def verdict(*effects):
        return Claim("", "", effects).row()[-1]

    assert verdict(0.1, 0.11, 0.12) == "appeared" and verdict(-0.1, -0.11, -0.12) == "opposite"
    assert verdict(0.1, 0.0, 0.2) == "not shown"  # 0.1 with an interval of +- 0.25
    assert Claim("", "", [0.1, 0.11, 0.12]).row()[2:4] == ["+0.110 nats", "± 0.025"]  # 4.30 * 0.01 / sqrt(3)


@pytest.fixture
def bench(corpus, tmp_path, script, monkeypatch):
    """Tiny runs, trained in this process, in an empty folder with a corpus named python."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data/python")
    base = "--n_embd=16 --n_layer=4 --n_head=4 --n_kv_head=4 --batch_size=1 --max_iters=4 --warmup_iters=0 "
    base += "--eval_interval=4 --eval_iters=1 --log_interval=1 --device=cpu --dtype=float32"
    trained = []

    def train_here(command):
        words = command[command.index("train") + 1 :] if "train" in command else command[2:]
        name = "train.py" if "train" not in command else "lab/studies/__main__.py"
        status, _, err = script(name, *(["train"] if "train" in command else []), *words)
        assert status == 0, err
        trained.append(words[-1])  # --out_dir
        return 0, ""

    def few_windows(model, tokens, n, *rest):
        return window_losses(model, tokens, 3, *rest)

    monkeypatch.setattr(workbench, "execute", train_here)
    monkeypatch.setattr(workbench, "window_losses", few_windows)
    monkeypatch.setattr(workbench, "SEEDS", 2)
    monkeypatch.setattr("train.matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(framework, "TURNS", 1)
    monkeypatch.setattr(recall, "TEXT", 20_000)
    tiny = Workbench("tiny", tmp_path / "out", base.split(), "--n_embd=8", "--n_embd=32", n_layer=4, steps=12)
    monkeypatch.setitem(main.SETS, "cpu", tiny)
    tiny.trained = trained
    return tiny


def test_every_study_from_runs_to_results(bench, script):
    status, out, err = script("lab/studies/__main__.py", "all")
    assert status == 0, err
    text = Path("RESULTS_TINY.md").read_text()
    in_short = text.split("\n\n")[1]
    assert in_short.endswith(".") and "loss" in in_short
    assert all(f"## {title}" in text for title in main.STUDIES.values())
    assert len(bench.trained) == len(set(bench.trained)) > 50
    for line in text.splitlines():
        if line.startswith("!["):
            assert Path(line.split("(")[1].rstrip(")")).stat().st_size > 5000, line
    claims = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(claims) > 20 and all(c.split(" | ")[-1] in VERDICTS for c in claims), claims
    section = text.split("## Against models for one plan")[1].split("\n## ")[0]
    (row,) = (line for line in section.splitlines() if line.startswith("| CLA-2 | 50% |"))
    tokens = data.Tokens("data/python", "val", 256)
    models = [load_run(bench.path(run))[0] for run in seeded("--plan=cla:2")]
    own = [window_losses(model, tokens, 3, 16).mean() for model in models]
    assert float(row.split(" | ")[2].split()[0]) == pytest.approx(np.mean(own), abs=6e-4)

    before = list(bench.trained)  # nothing is done twice
    status, out, err = script("lab/studies/__main__.py", random.choice(list(main.STUDIES)))
    assert status == 0 and bench.trained == before and Path("RESULTS_TINY.md").read_text() == text


def test_a_run_of_other_settings_is_trained_anew(bench):
    bench.train(["--seed=0"])
    bench.measured("--seed=0", "it", lambda: [1])
    bench.train(["--seed=0"])
    assert len(bench.trained) == 1 and bench.measured("--seed=0", "it", lambda: [2]) == 1
    bench.base = [*bench.base, "--weight_decay=0.2"]
    bench.train(["--seed=0"])
    assert len(bench.trained) == 2 and bench.measured("--seed=0", "it", lambda: [2]) == 2


VERDICTS = {"appeared |", "not shown |", "opposite |"}


def test_a_variation_passes_its_rule_and_its_model(corpus, tmp_path, script):
    """`train VARIANT` trains with them, and the run is loaded with its class of model."""
    from test_train import flags

    out = tmp_path / "run"
    given = flags(corpus, out, max_iters=2, plan="fusedkv")
    assert script("lab/studies/__main__.py", "train", "untied", *given)[0] == 0
    model, _ = load_run(out, model_class=Untied)
    assert model.blocks[3].attn.k_gate.size(-1) == 2 * make_model("fusedkv").blocks[3].attn.k_gate.size(-1)
    with pytest.raises(ValueError, match="does not hold the model"):
        load_run(out, model_class=GPT)


def test_a_rule_that_changes_is_evaluated_as_it_is_at_the_step(corpus, tmp_path, script, monkeypatch):
    """At the end `falling` draws the full plan alone, and is evaluated so."""
    from test_train import flags, read_log

    monkeypatch.setattr(variants, "STEPS", 4)
    given = flags(corpus, tmp_path / "run", max_iters=4, eval_interval=4, router_p=1)
    assert script("lab/studies/__main__.py", "train", "falling", *given)[0] == 0
    losses, routed = read_log(tmp_path / "run", "val_loss"), read_log(tmp_path / "run", "val_loss_routed")
    assert losses[0] != routed[0] and losses[4] == routed[4]


def test_mistakes(refused):
    name = "lab/studies/__main__.py"
    assert "no variation 'nope'; valid are falling" in refused(name, "train", "nope")
    assert "invalid choice: 'nope'" in refused(name, "nope")
