"""lab.studies: its variations, against what they say they are; every study, from runs to RESULTS.md."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

import data
import lab.studies.__main__ as main
from kv_router import Plan, StochasticRouter
from lab.studies import framework, workbench
from lab.studies.deploy import deployments
from lab.studies.report import Claim
from lab.studies.variants import VARIANTS, BeforeRope, Distilled, Even, Untied
from lab.studies.workbench import Workbench, seeded
from model import GPT
from runs import load_run, window_losses
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
    moved_v = set()
    for step, plan in enumerate(plans):
        assert not plan.cyclic and plan[0].k == plan[0].v == (0,)
        for i, route in enumerate(plan.routes):
            (k,), (v,) = route.k, route.v
            moved_v |= {v} if v != i else set()
            if "apart" not in name:
                assert v == (0 if "bottom-v" in name and k != i else k)
            if "kept" in name and k != i:
                assert plan[k].k == (k,) and not any(plan[j].k == (j,) for j in range(k + 1, i + 1))
        if "alternate" in name and step % 2 == 0:
            assert plan.spec == "full"
    assert moved_v == ({0} if "bottom-v" in name or "apart" in name else set(range(7)))


def test_ramp_starts_full():
    assert StochasticRouter(8, 0.5, seed=3, **VARIANTS["ramp"]).plan(0).spec == "full"


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


def test_distillation_trains_both_plans():
    plain, idx = make_model(n_layer=4), torch.randint(61, (2, 16))
    model, plan = Distilled(plain.config), Plan.parse("keep:0", 4)
    model.load_state_dict(plain.state_dict())
    loss, same = (model(idx, idx, plan=p)[1] for p in (plan, model.plan))
    full = model(idx, idx)[1]
    torch.testing.assert_close(same, full)  # nothing to learn from itself
    logits = [model.logits(idx, p).log_softmax(-1) for p in (model.plan, plan)]
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    torch.testing.assert_close(loss, full + divergence)


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
        return Claim("", effects).row()[-1]

    assert verdict(0.1, 0.11, 0.12) == "appeared" and verdict(-0.1, -0.11, -0.12) == "opposite"
    assert verdict(0.1, 0.0, 0.2) == "did not appear"  # 0.1 with an interval of +- 0.25
    assert verdict(0.5) == "one seed, no verdict"
    assert Claim("", [0.1, 0.11, 0.12], verdict="untestable").row()[-1] == "untestable"
    assert Claim("", [0.1, 0.11, 0.12]).row()[1:3] == ["+0.110 nats", "± 0.025"]  # 4.30 * 0.01 / sqrt(3)


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
        trained.append(words[-2])  # --out_dir
        return 0, ""

    def few_windows(model, tokens, n, *rest):
        return window_losses(model, tokens, 3, *rest)

    monkeypatch.setattr(workbench, "execute", train_here)
    monkeypatch.setattr(workbench, "window_losses", few_windows)
    monkeypatch.setattr(workbench, "SEEDS", 2)
    monkeypatch.setattr("train.matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(framework, "TURNS", 1)
    tiny = Workbench("tiny", tmp_path / "out", base.split(), "--n_embd=8", "--n_embd=24", n_layer=4, steps=12)
    monkeypatch.setitem(main.SETS, "cpu", tiny)
    tiny.trained = trained
    return tiny


def test_every_study_from_runs_to_results(bench, script):
    status, out, err = script("lab/studies/__main__.py", "all")
    assert status == 0, err
    text = Path("RESULTS_TINY.md").read_text()
    assert all(f"## {title}" in text for title in main.STUDIES.values())
    assert len(bench.trained) == len(set(bench.trained)) > 50
    for line in text.splitlines():
        if line.startswith("!["):
            assert Path(line.split("(")[1].rstrip(")")).stat().st_size > 5000, line
    claims = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(claims) > 20 and all(c.split(" | ")[-1] in VERDICTS for c in claims), claims
    (row,) = (line for line in text.splitlines() if line.startswith("| CLA-2 | 50.0%"))
    tokens = data.Tokens("data/python", "val", 256)
    own = [
        window_losses(load_run(bench.path(run))[0], tokens, 3, 16).mean() for run in seeded("--plan=cla:2", 2)
    ]
    assert float(row.split(" | ")[2].split()[0]) == pytest.approx(np.mean(own), abs=6e-4)

    before = list(bench.trained)  # nothing is done twice
    status, out, err = script("lab/studies/__main__.py", random.choice(list(main.STUDIES)))
    assert status == 0 and bench.trained == before and Path("RESULTS_TINY.md").read_text() == text


VERDICTS = {"appeared |", "did not appear |", "opposite |"}


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


def test_mistakes(refused):
    name = "lab/studies/__main__.py"
    assert "no variation 'nope'; valid are bottom-v" in refused(name, "train", "nope")
    assert "invalid choice: 'nope'" in refused(name, "nope")
