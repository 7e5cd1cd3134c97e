"""lab.bench on models of a moment: what it writes, what it refuses, and that the peer it measures is the same
model. Its figures themselves are not for tests."""

import json
import time

from kv_router import Plan
from lab import bench

import pytest
import torch
from conftest import make_model

TINY = ["--n_layer", 4, "--n_head", 4, "--n_kv_head", 2, "--n_embd", 32, "--vocab_size", 61, "--no_compile"]
TINY += ["--device", "cpu", "--dtype", "float32", "--repeats", 1]


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_measures_every_plan_beside_its_prediction(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--prompts", 300, 8, "--new_tokens", 3, "--memory_gb", 0.01, "--peer", "hf"]
    status, out, err = script("lab/bench.py", *TINY, *args)
    assert status == 0, err
    rows = rows_of(tmp_path / "out/bench/bench.jsonl")
    assert (tmp_path / "out/bench/bench.png").stat().st_size > 10_000
    names = [*bench.PLANS, "transformers"]
    latency, capacity = rows[: 2 * len(names)], rows[2 * len(names) :]
    assert [(r["context"], r["name"]) for r in latency] == [(p, n) for p in (8, 300) for n in names]
    full = {r["context"]: r for r in latency if r["name"] == "full"}
    for r in latency:
        assert 0 < r["tpot"] < 60 and 0 < r["ttft"] < 60 and r["of_bandwidth"] > 0
        if r["name"] != "transformers":  # measured on the tensors, exactly as predicted
            ratio = r["cache_bytes"] / full[r["context"]]["cache_bytes"]
            assert ratio == Plan.parse(r["plan"], 4).cache_ratio
        assert f"{r['name']:12}  {r['context']:7}" in out
    assert [r["name"] for r in capacity] == bench.PLANS and all(r["ttft"] is None for r in capacity)
    batches = {r["name"]: r["batch"] for r in capacity}
    position = 2 * 4 * 2 * 8 * 4  # K and V, 4 layers, 2 heads of 8 features, 4 bytes
    assert batches["full"] == 10_000_000 // (384 * position)  # 300 tokens take three blocks
    assert batches["yoco"] == 10_000_000 // (384 * position // 2)
    assert capacity[0]["cache_bytes"] == batches["full"] * 384 * position
    assert capacity[0]["tokens_per_s"] == pytest.approx(batches["full"] / capacity[0]["tpot"])


def test_training_is_measured(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text("batch_size = 2\nblock_size = 16")
    args = ["--train", "--config", "x.toml", "--optimizer", "adamw"]
    status, out, err = script("lab/bench.py", *TINY, *args)
    assert status == 0, err
    rows = rows_of(tmp_path / "out/bench/bench_train.jsonl")
    assert [r["plan"] for r in rows] == ["full", "full", "fusedkv", "sandwich-top:2"]
    assert all(r["tokens_per_s"] > 0 and r["peak_memory"] > 10_000 and r["name"] in out for r in rows)


@torch.no_grad()
def test_the_peer_is_the_same_model():
    model = make_model(qk_norm=True, block_size=64)
    peer, idx = bench.HuggingFace(model), torch.randint(61, (2, 20))
    ours = list(bench.Ours(model, "full").tokens(idx, 8, None))
    theirs = list(peer.tokens(idx, 8, peer.cache(2, 28)))
    assert torch.equal(torch.cat(ours, 1), torch.cat(theirs, 1))
    assert peer.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()  # handed over in memory


def test_a_clock_gives_the_seconds_between_marks():
    clock = bench.Clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
        time.sleep(0.02)
    assert len(clock.seconds()) == 2 and all(0.02 <= s < 60 for s in clock.seconds())


@pytest.mark.parametrize(
    "args, part",
    [
        (["--prompts", 0], "0 is not valid; it must be 1 or more"),
        (["--new_tokens", 1], "1 is not valid; it must be 2 or more"),
        (["--memory_gb", 0.0001, "--prompts", 300], "tokens under full needs 197 kB; ask for more"),
        (["--memory_gb", "nan"], "--memory_gb nan"),
        (["--memory_gb", "inf"], "--memory_gb inf"),
        (["--device", "cuda:9"], "--device cuda:9 is not available here"),
        (["--plans", "keep:9"], "layer '9'"),
        (["--plans", "auto:0.5"], "--plans auto:0.5 takes what was searched for a run"),
    ],
)
def test_mistakes(args, part, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused("lab/bench.py", *TINY, *args)
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed(monkeypatch, refused, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "--peer hf needs the package transformers" in refused("lab/bench.py", *TINY, "--peer", "hf")


def test_a_run_is_measured_with_its_own_sizes(corpus, tmp_path, script, refused):
    from test_train import flags

    out = tmp_path / "run"
    assert script("train.py", *flags(corpus, out, max_iters=1))[0] == 0
    base = ["--out_dir", out, "--no_compile", "--repeats", 1, "--device", "cpu", "--dtype", "float32"]
    status, text, err = script("lab/bench.py", *base, "--prompts", 16, "--new_tokens", 4)
    assert status == 0 and (out / "bench.png").exists(), err
    assert {r["name"] for r in rows_of(out / "bench.jsonl")} == set(bench.PLANS)
    line = refused("lab/bench.py", *base, "--prompts", 64)
    assert "--prompts 64 and 16 new tokens do not fit the context of 32" in line
    assert "--n_layer is for random weights" in refused("lab/bench.py", *base, "--n_layer", 2)
