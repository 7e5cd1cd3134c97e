"""The GPU against the CPU, which the other tests check: `pytest -m gpu`. Where there is no GPU, both are the
CPU, which proves these tests. And `python -m lab.gpu`, from its first step to its page."""

import copy
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import kernels
from kv_router import StochasticRouter
from lab import gpu
from model import GPT, KVCache
from support.devices import autocast
from train import TrainConfig, make_optimizers, take_step

import pytest
import torch
from conftest import make_model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PLANS = ["full", "cla:2", "fusedkv", "fusedkv-lite", "shared-v", "0_1_k1v0+1_k0+1v0", "sandwich-top:2"]
SIZES = {"n_embd": 128, "n_head": 4, "n_kv_head": 2, "block_size": 300, "vocab_size": 512}


def ids(T: int) -> torch.Tensor:
    return torch.randint(512, (2, T), generator=torch.Generator().manual_seed(1))


def loss(model: GPT, idx: torch.Tensor, device: str, dtype=torch.float32) -> float:
    with torch.no_grad(), autocast(device, dtype):
        return float(model(idx[:, :-1].to(device), idx[:, 1:].to(device))[1])


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_losses_in_float32_and_bfloat16(plan):
    model, idx = make_model(plan, **SIZES), ids(200)
    expected = loss(model, idx, "cpu")
    model = copy.deepcopy(model).to(DEVICE)
    assert loss(model, idx, DEVICE) == pytest.approx(expected, rel=1e-3)  # TF32
    assert loss(model, idx, DEVICE, torch.bfloat16) == pytest.approx(expected, rel=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("plan, p", [("full", 0.5), ("fusedkv", 0.0), ("sandwich-top:2", 0.0)])
def test_training_steps_as_on_the_cpu(plan, p, optimizer):
    """Three steps, compiled on a GPU."""
    found, idx = [], ids(65)
    tokens = SimpleNamespace(batch=lambda *_: (idx[:, :-1], idx[:, 1:]))
    c = TrainConfig(n_layer=4, plan=plan, batch_size=2, block_size=64, optimizer=optimizer, warmup_iters=0)
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = GPT(c.model_config(vocab_size=512)).to(device)
        if device == "cuda":
            kernels.compile_training(model)
        router = StochasticRouter(4, p) if p else None
        optimizers, context = make_optimizers(model, c), partial(autocast, device, torch.float32)
        step = partial(take_step, c=c, model=model, router=router, optimizers=optimizers, tokens=tokens)
        found.append([step(i, context=context, device=device).tolist() for i in range(3)])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_recorded_decoding_as_on_the_cpu(plan):
    """Greedy tokens over a block's end; a step is recorded once and serves every prompt."""
    model, prompt = make_model(plan, **SIZES), ids(120)
    expected = model.generate(prompt, 20, temperature=0)
    model = copy.deepcopy(model).to(DEVICE)
    if CUDA:
        kernels.compile_decoding(model)
    cache, graphs = KVCache(model.config, model.plan, 2, 140, device=DEVICE), set()
    for length in (120, 60, 120):
        cache.length = 0
        new = model.stream(prompt[:, :length].to(DEVICE), 20, temperature=0, cache=cache)
        got = torch.cat(list(new), dim=1).cpu()
        graphs.add(cache.graph)
        assert length < 120 or torch.equal(got, expected[:, 120:])
    assert len(graphs) == 1 and (None in graphs) != CUDA


def test_the_whole_command_on_a_cpu(corpus, tmp_path, script, monkeypatch):
    """All stages but the tests, which would run this one; a step that fails does not stop the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(corpus, tmp_path / "data" / "python")
    monkeypatch.setitem(gpu.STAGES["runs"], "broken", (60, "sweep.py --out_dir {}/none", ""))
    monkeypatch.setitem(gpu.STAGES["runs"], "endless", (1, "-c 'while True: pass'", ""))
    stages = ("decode", "long", "train", "runs")
    status, _, err = script("lab/gpu.py", "--device", "cpu", "--stages", *stages)
    assert status == 2 and "broken, endless failed; see the logs in out/gpu" in err
    rows = [json.loads(line) for line in (tmp_path / "out/gpu/steps.jsonl").read_text().splitlines()]
    failed = {"broken": 2, "endless": None}
    assert {row["step"]: row["status"] for row in rows if row["status"] != 0} == failed, [
        (tmp_path / f"out/gpu/{row['step']}.log").read_text() for row in rows
    ]
    page = (tmp_path / "out/gpu/report.md").read_text()
    for part in ("| decode | done |", "| broken | **status 2** |", "| endless | **over its limit** |"):
        assert part in page
    for part in (f"Python {sys.version.split()[0]}", "of data sheet", "ratio (pred.)", "first token after"):
        assert part in page
    # a stage again replaces its own rows and keeps the others
    monkeypatch.setattr(
        gpu, "take", lambda name, *_: {"step": name, "command": "x", "status": 0, "seconds": 1}
    )
    assert script("lab/gpu.py", "--device", "cpu", "--stages", "runs")[0] == 0
    again = [json.loads(line) for line in (tmp_path / "out/gpu/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert all(row["status"] == 0 for row in again)
