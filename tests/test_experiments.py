"""experiments.py: its variations, against what they say they are; every study, from runs to RESULTS.md."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model

import experiments
import model as model_file
import train
from experiments import EXPERIMENTS, VARIANTS, Lab, deployments, varied
from kv_router import Plan


@pytest.mark.parametrize("name", [n for n, (owner, *_) in VARIANTS.items() if owner is train])
def test_rules_draw_what_they_say(name):
    router = VARIANTS[name][2](8, 0.5, 3)
    plans = [router.plan(step) for step in range(400)]
    assert plans == [router.plan(step) for step in range(400)] and len(set(plans)) > 50
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
    assert VARIANTS["ramp"][2](8, 0.5, 3).plan(0).spec == "full"


def test_fusion_variants():
    """With tied gates `untied` is FusedKV; `before-rope` turns the sum of unturned keys; `even` is even."""
    tied = make_model("fusedkv", n_layer=4)
    idx = torch.randint(61, (2, 16))
    with varied("untied"):
        model = make_model("fusedkv", n_layer=4)
    weights = tied.state_dict()
    weights |= {n: torch.cat((g, g), -1) for n, g in weights.items() if n.endswith("k_gate")}
    model.load_state_dict(weights)
    torch.testing.assert_close(model.logits(idx), tied.logits(idx))
    with varied("before-rope"):
        before = make_model("fusedkv", n_layer=4)
    before.load_state_dict(weights)  # equal gates for both features of a pair: turning before or after is one
    torch.testing.assert_close(before.logits(idx), tied.logits(idx), rtol=1e-4, atol=1e-4)
    before.blocks[3].attn.k_gate.data.normal_()
    model.load_state_dict(before.state_dict())
    assert (before.logits(idx) - model.logits(idx)).abs().max() > 1e-3
    with varied("even"):
        even = model_file.GPT(tied.config)
    assert all((block.attn.k_gate == 0.5).all() for block in even.blocks[2:])
    assert model_file.Attention is experiments.Attention  # and all is as it was


def test_distillation_trains_both_plans():
    model, idx = make_model(n_layer=4), torch.randint(61, (2, 16))
    plan = Plan.parse("keep:0", 4)
    with varied("distilled"):
        loss = model(idx, idx, plan=plan)[1]
        same = model(idx, idx, plan=model.plan)[1]
    full = model(idx, idx)[1]
    torch.testing.assert_close(same, full)  # nothing to learn from oneself
    logits = [model.logits(idx, p).log_softmax(-1) for p in (model.plan, plan)]
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    torch.testing.assert_close(loss, full + divergence)


def test_deployments_fit_their_share():
    for share in (0.75, 0.5, 0.25, 0.125):
        for spec in deployments(8, share):
            assert Plan.parse(spec, 8).cache_ratio <= share, (share, spec)


@pytest.fixture
def lab(corpus, tmp_path, script, monkeypatch):
    """A lab of tiny runs, trained in this process, in an empty folder with a corpus named python."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data/python")
    base = "--n_embd=16 --n_layer=4 --n_head=4 --n_kv_head=4 --batch_size=1 --max_iters=4 --warmup_iters=0"
    base = [*base.split(), "--eval_interval=4", "--eval_iters=1", "--log_interval=1", "--device=cpu"]
    trained = []

    def train_here(self, names):
        names = list(dict.fromkeys(names))
        self.used += names
        for name in names:
            if (self.path(name) / "finished.json").exists():
                continue
            words = name.split()
            program = ["experiments.py", "train", words.pop(0)] if words[0] in VARIANTS else ["train.py"]
            status, _, err = script(*program, *self.base, *words, f"--out_dir={self.path(name)}")
            assert status == 0, err
            (self.path(name) / "finished.json").write_text(json.dumps(self.base + name.split()))
            trained.append(name)

    def few_windows(model, tokens, n, *rest):
        return train.window_losses(model, tokens, 3, *rest)

    monkeypatch.setattr(Lab, "train", train_here)
    monkeypatch.setattr(experiments, "window_losses", few_windows)
    monkeypatch.setattr(train, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(experiments, "TURNS", 1)
    some = (*experiments.FINALISTS, "apart", "distilled")
    monkeypatch.setattr(experiments, "RULES", {name: experiments.RULES[name] for name in some})
    lab = Lab("tiny", tmp_path / "out", base, "--n_embd=8", "--n_embd=24", n_layer=4, steps=12, jobs=1)
    monkeypatch.setitem(experiments.SETS, "cpu", lab)
    lab.trained = trained
    return lab


def test_every_study_from_runs_to_results(lab, script):
    status, out, err = script("experiments.py", "all")
    assert status == 0, err
    text = Path("RESULTS_TINY.md").read_text()
    assert all(f"## {title}" in text for _, title in EXPERIMENTS.values())
    assert len(lab.trained) == len(set(lab.trained)) > 50
    for line in text.splitlines():
        if line.startswith("!["):
            assert Path(line.split("(")[1].rstrip(")")).stat().st_size > 5000, line
    claims = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(claims) > 20 and all(c.split(" | ")[-1] in VERDICTS for c in claims), claims
    (row,) = (line for line in text.splitlines() if line.startswith("| CLA-2 | 50.0%"))
    model, _ = train.load_run(lab.path("--plan=cla:2 --seed=0"))
    own = train.window_losses(model, lab.tokens("--seed=0"), 3, 16).mean()
    assert float(row.split(" | ")[2]) == pytest.approx(own, abs=6e-4)

    before = list(lab.trained)
    status, out, err = script("experiments.py", random.choice(list(EXPERIMENTS)))  # nothing is done twice
    assert status == 0 and lab.trained == before and Path("RESULTS_TINY.md").read_text() == text


VERDICTS = {"appeared |", "did not appear |", "opposite |"}


def test_mistakes(refused):
    assert "no variation 'nope'; valid are kept" in refused("experiments.py", "train", "nope")
    assert "invalid choice: 'nope'" in refused("experiments.py", "nope")
    assert "--jobs 0 is not valid" in refused("experiments.py", "cache", "--jobs", 0)
