"""Pretrained folders under plans that they were not trained for."""

import json
from pathlib import Path

from data import Tokens
from kv_router import Plan
from support.convert import convert, fit, reading_errors
from support.hf import load_hf, save_hf
from support.runs import load_run, window_losses

import pytest
import torch
from conftest import make_model

pytest.importorskip("safetensors")
SIZES = ["--n_layer=4", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--block_size=32"]
RUN = ["--batch_size=16", "--eval_iters=2", "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """A small model, trained until its layers need their own keys and values, as a Hugging Face folder."""
    import sys

    import train

    out = tmp_path_factory.mktemp("pretrained")
    sys.argv, argv = ["train.py", *SIZES, *RUN, "--max_iters=250", "--eval_interval=250"], sys.argv
    sys.argv += [f"--data_dir={corpus.parent}", f"--dataset={corpus.name}", f"--out_dir={out / 'run'}"]
    train.main()
    sys.argv = argv
    save_hf(load_run(out / "run")[0], out / "folder", out / "run")
    return out / "folder"


@pytest.fixture
def converted(corpus, folder, tmp_path, script):
    """converted(flags ...) -> what train.py --init_from=hf:... made of the folder, and its held-out loss."""

    def call(*flags) -> tuple[Path, float]:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        where = [f"--data_dir={corpus.parent}", f"--dataset={corpus.name}", f"--out_dir={out}"]
        status, _, err = script("train.py", f"--init_from=hf:{folder}", "--max_iters=0", *RUN, *where, *flags)
        assert status == 0, err
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return out, rows[-1]["val_loss"]

    return call


@pytest.mark.parametrize("plan", ["keep:0", "yoco", "0_k1v0_k2v0_k3v0", "fusedkv"])
def test_fitting_undoes_half_of_what_a_plan_adds(converted, plan):
    untouched = converted("--plan=full")[1]
    added = converted(f"--plan={plan}", "--fit_tokens=0")[1] - untouched
    left = converted(f"--plan={plan}")[1] - untouched
    assert added > 0.02 and left < added / 2, (added, left)


def test_fitting_is_deterministic_and_goes_out_and_comes_back(converted, folder, tmp_path, script):
    (first, loss), (second, again) = (converted("--plan=cla:2", "--fit_tokens=2000") for _ in range(2))
    a, b = (load_run(out)[0].state_dict() for out in (first, second))
    assert loss == again and all(torch.equal(a[name], b[name]) for name in a)
    assert script("support/hf.py", first, tmp_path / "out")[0] == 0
    back = load_hf(tmp_path / "out")
    assert back.plan.spec == "keep:0,2"
    assert all(torch.equal(a[name], p) for name, p in back.state_dict().items())
    assert converted("--plan=cla:2", "--fit_tokens=4000")[1] != loss


def test_what_needs_no_fitting_stays():
    """All of a model under its own plan, and the layers below the first that reads another's."""
    original, idx = make_model(), torch.randint(61, (6, 20))
    for plan, kept in (("full", 4), ("keep:0,1", 2)):
        new = convert(original, plan)
        missed = fit(new, original, idx)
        assert all(share < 1e-9 for share in missed[:kept]) and all(share > 0.01 for share in missed[kept:])
        for i in range(kept):
            for name, p in new.blocks[i].state_dict().items():
                assert torch.equal(p, original.blocks[i].state_dict()[name])


def test_fitting_comes_closer_to_the_residual_stream_with_more_text():
    """On the text that it was fitted to and on other text, against the plan without fitting."""
    original = make_model()
    idx = torch.randint(61, (80, 20), generator=torch.Generator().manual_seed(0))
    distances = []
    for n in (0, 8, 64):
        new = convert(original, "0_0_k2v0_k0+1v0+1")
        if n:
            fit(new, original, idx[:n])
        gap = new.logits(idx[64:]) - original.logits(idx[64:])
        distances.append(float(gap.detach().square().mean()))
    assert distances[0] > distances[1] > distances[2]


def test_mistakes(folder, corpus, tmp_path, refused):
    where = [f"--data_dir={corpus.parent}", f"--dataset={corpus.name}", f"--out_dir={tmp_path / 'run'}"]
    hf = f"hf:{folder}"
    line = refused("train.py", f"--init_from={hf}", "--plan=sandwich-top:2", "--max_iters=0", *RUN, *where)
    assert "is cyclic, which cannot be fitted; say --fit_tokens=0" in line and not (tmp_path / "run").exists()
    assert "--save_dir FOLDER is needed with hf:FOLDER" in refused("sweep.py", "--out_dir", hf)
    line = refused("sweep.py", "--out_dir", hf, "--save_dir", tmp_path)
    assert "needs --dataset NAME, a corpus of its own tokenizer" in line
    line = refused("sample.py", "--out_dir", hf, "--plan", "auto:0.5")
    assert "is for runs; take a plan itself" in line


def test_reading_errors_are_what_the_definition_says():
    """Attention over another layer's keys or values, and the best output projection for that."""
    model, idx = make_model(), torch.randint(61, (6, 32))
    errors = reading_errors(model, idx)
    assert set(errors) == {(i, kind, j) for i in range(4) for j in range(i) for kind in "kv"}
    x = model.embed(idx)
    rope = model.rope(slice(32))
    kvs, inputs = [], []
    for block in model.blocks:
        q, k, v = block.project(x, rope, True, True, True)
        kvs.append((k, v))
        inputs.append((x, q))
        x = block(x, q, ([k], [v]), False)
    for (i, kind, j), error in errors.items():
        x, q = inputs[i]
        k, v = (kvs[j][0], kvs[i][1]) if kind == "k" else (kvs[i][0], kvs[j][1])
        causal = torch.ones(32, 32).tril().bool()
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        p = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        size = x.square().mean(-1, keepdim=True).sqrt()
        a = ((p @ v).transpose(1, 2).flatten(2) / size).flatten(0, 1)
        y = (model.blocks[i].attn(q, ([kvs[i][0]], [kvs[i][1]]), False, None) / size).flatten(0, 1)
        best = torch.linalg.lstsq(a, y).solution
        floor = float((y - a @ best).square().sum() / y.numel())
        assert floor <= error * 1.001 and error < floor + 0.1 * float(y.square().mean())


def test_folders_everywhere(folder, corpus, tmp_path, script):
    """sample.py, sweep.py and lab.bench take hf:FOLDER; a search writes plans, and nothing into the
    folder."""
    before = sorted(path.name for path in folder.iterdir())
    hf, where = f"hf:{folder}", ["--data_dir", corpus.parent, "--dataset", corpus.name]
    status, text, err = script("sample.py", "--out_dir", hf, "--plan", "cla:2", "--max_new_tokens", 4)
    assert status == 0 and "--- cla:2: first token after" in text, err
    out = tmp_path / "swept"
    sweep = ("sweep.py", "--out_dir", hf, *where, "--windows", 8, "--save_dir", out, "--block_size", 24)
    sweep += ("--dtype", "float32")
    assert script(*sweep, "--plans", "full", "cla:2")[0] == 0
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [row["plan"] for row in rows] == ["full", "keep:0,2"] and rows[0]["tokens"] == 8 * 24
    val = Tokens(corpus, "val", 24)
    expected = window_losses(load_hf(folder), val, 8, 8).mean()
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-5)
    status, text, _ = script(*sweep, "--search")
    assert status == 0 and "50.0%  --plan=" in text
    found = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    assert [row["cache_ratio"] for row in found] == [n / 8 for n in range(8, 1, -1)]
    plans = [Plan.parse(row["plan"], 4) for row in found]
    errors = reading_errors(
        load_hf(folder), torch.cat([x for x, _ in Tokens(corpus, "train", 24).held_out(2, 2)])
    )
    first = min(errors, key=errors.get)  # the cheapest of all drops comes first
    assert getattr(plans[1][first[0]], first[1]) == (first[2],)
    bench = (
        "lab/bench.py",
        "--out_dir",
        hf,
        "--prompts",
        8,
        "--new_tokens",
        2,
        "--no_compile",
        "--repeats",
        1,
    )
    assert script(*bench, "--save_dir", tmp_path / "bench")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == before
