"""lab.studies: claims against their numbers, and a study from its runs to RESULTS.md."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import data
from kv_router import Plan
from lab import measures, studies
from support.runs import load_run, window_losses

import pytest
import torch

TINY = "--n_embd=16 --n_layer=4 --n_head=4 --n_kv_head=4 --batch_size=1 --max_iters=4 --warmup_iters=0 "
TINY += "--eval_interval=4 --eval_iters=1 --log_interval=1 --device=cpu --dtype=float32"


def test_an_inequality_holds_by_the_difference_of_its_sides():
    x = {"a": [1.0, 2.0], "b, c@0.5": [2.0, 5.0], "d:4@1": [3.0, 3.0]}
    assert list(studies.effects("{a} < {b, c@0.5}", x)) == [1, 3]
    assert list(studies.effects("{b, c@0.5} - {a} < 1.5 * {d:4@1}", x)) == [3.5, 1.5]


def test_every_claim_is_about_numbers_that_its_study_has():
    for study in studies.STUDIES.values():
        runs = [(run, share) for run in study["runs"] for share in study["shares"]]
        x = {run if share is None else f"{run}@{share}": [1.0, 2.0, 3.0] for run, share in runs}
        for source, _, wanted in study["claims"].values():
            assert source in ("ours", "2604.22782", "2512.03870", "2410.14442")
            for line in [wanted] if isinstance(wanted, str) else wanted:
                assert len(studies.effects(line.split(": ", 1)[-1], x)) == 3
        for recipe in study["recipes"].values():
            for settings in study["runs"].values():  # a plan that does not parse, a file that is not there
                assert Path(recipe.split()[0]).exists()
                specs = [word[7:] for word in settings.split() if word.startswith("--plan=")]
                assert all(Plan.parse(spec, 8) for spec in specs)


def test_verdicts_follow_from_the_interval():
    study = {"claims": {"x": ["ours", "it holds", ""]}}
    for effect, margin, word in ((0.1, 0.05, "appeared"), (-0.1, 0.05, "opposite"), (0.1, 0.2, "not shown")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(studies, "STUDIES", {"s": study})
            table = studies.claims_table({"s": {"claims": {"x": {"": [effect, margin]}}}})
        assert table.splitlines()[-1] == f"| ours | it holds | {effect:+.3f} ± {margin:.3f} | {word} |"


def test_deployments_fit_their_share():
    for share in (0.75, 0.5, 0.25, 0.1875, 0.125):
        for lowest in (0, 1, 2):
            for spec in measures.deployments(8, share, lowest):
                plan = Plan.parse(spec, 8)
                assert plan.cache_ratio <= share, (share, lowest, spec)
                if len(plan.k_layers) > lowest:
                    assert all(r.k == (i,) or r.k[0] >= lowest for i, r in enumerate(plan.routes)), spec


def test_puzzles_ask_for_pairs_that_they_gave():
    text = measures.puzzle(random.Random(0), 8, 40)
    pairs = [*zip(text[::2], text[1::2])]
    assert len(pairs) == 48 and len(dict(pairs[:8])) == 8 and set(pairs[8:]) == set(pairs[:8])
    assert text.isalpha() and text[::2].islower() and text[1::2].isupper()


def test_recall_counts_the_values_that_are_asked_for(tmp_path, monkeypatch):
    """A model that always knows the next token recalls all, and one that guesses a single letter few."""
    monkeypatch.chdir(tmp_path)
    data.prepare(Path("data/recall"), lambda: measures.recall_documents(20_000), "bytes", "test")
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

    monkeypatch.setattr(measures, "opened", lambda out: (Knows(), {"val": tokens}, None))
    monkeypatch.setattr(measures, "deployed", lambda out, share: Plan.parse("full", 2))
    assert measures.recall(None, 1, n=3) == 1
    monkeypatch.setattr(Knows, "logits", lambda self, idx, plan: torch.eye(257)[65].expand(*idx.shape, 257))
    assert measures.recall(None, 1, n=50) < 0.1


@pytest.fixture
def tiny(corpus, tmp_path, script, monkeypatch):
    """A study of four runs, trained in this process, in an empty folder with a corpus named python."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data/python")
    Path("results").mkdir()
    Path("results/README.md").write_text("# Results\n\n<!-- the studies -->\n\nThe end.\n")
    trained = []

    class Child:
        def __init__(self, command):
            assert script(*command[1:])[0] == 0
            trained.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(studies, "subprocess", SimpleNamespace(Popen=Child))
    claims = {"x": ["ours", "CLA is worse", "{normal} < {CLA}"]}
    study = {"title": "A study", "text": "Tiny.", "recipes": {"": TINY}, "shares": [None], "seeds": [0, 1]}
    study |= {"runs": {"normal": "", "CLA": "--plan=cla:2"}, "claims": claims}
    monkeypatch.setattr(studies, "STUDIES", {"tiny": study})
    return trained


def test_a_study_from_its_runs_to_results(tiny, script):
    status, _, err = script("lab/studies.py", "tiny")
    assert status == 0 and len(tiny) == 4, err
    found = json.loads(Path("results/tiny.json").read_text())
    text = Path("RESULTS.md").read_text()
    assert text.startswith("# Results") and "## A study" in text and text.endswith("The end.\n")
    assert Path("results/tiny.png").stat().st_size > 5000 and found["provenance"].startswith("4 runs of ")
    losses = []
    for words in ("", "--plan=cla:2"):
        outs = [studies.train(f"{TINY} {words}".strip(), seed) for seed in (0, 1)]
        models = [load_run(out)[0] for out in outs]
        tokens = data.Tokens("data/python", "val", 256)
        losses.append([window_losses(model, tokens, 64, 16).mean() for model in models])
    mean, deviation = found["numbers"][""]["CLA"][""]
    assert mean == pytest.approx(sum(losses[1]) / 2, abs=1e-5)
    assert f"| CLA | {mean:.3f} ± {deviation:.3f} |" in text
    effect = sum(b - a for a, b in zip(*losses)) / 2
    assert found["claims"]["x"][""][0] == pytest.approx(effect, abs=1e-5)
    assert len(tiny) == 4  # nothing is trained twice
    assert script("lab/studies.py", "all")[0] == 0 and Path("RESULTS.md").read_text() == text


def test_results_are_written_from_the_tracked_numbers(monkeypatch, tmp_path, script):
    """Without a run: RESULTS.md as it is in the repository."""
    root = Path(studies.__file__).parent.parent
    shutil.copytree(root / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert script("lab/studies.py", "write")[0] == 0
    assert Path("RESULTS.md").read_text() == (root / "RESULTS.md").read_text()


def test_mistakes(refused):
    assert "invalid choice: 'nope'" in refused("lab/studies.py", "nope")
