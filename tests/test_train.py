"""The scripts from end to end, on a small corpus and a model that trains in seconds."""

import ast
import graphlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import data
import train
from data import Tokens
from kv_router import Plan, StochasticRouter
from model import GPT
from support import devices
from support.cli import read_toml
from support.runs import load_checkpoint, load_run, window_losses
from train import TrainConfig

import pytest
import torch
from conftest import ROOT

SMALL = {
    "n_layer": 4, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "block_size": 32, "batch_size": 8,
    "max_iters": 12, "warmup_iters": 2, "eval_interval": 6, "eval_iters": 2, "log_interval": 1,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip


def flags(corpus, out, **settings):
    settings = SMALL | {"data_dir": corpus.parent, "dataset": corpus.name, "out_dir": out} | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def read_log(out, key):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A normal, a stochastic and a FusedKV run of 60 steps."""
    folder = tmp_path_factory.mktemp("out")
    runs = {"normal": {}, "stochastic": {"router_p": 0.5}, "fusedkv": {"plan": "fusedkv"}}
    argv = sys.argv
    for name, settings in runs.items():
        sys.argv = [
            "train.py",
            *flags(corpus, folder / name, max_iters=60, eval_interval=20, log_interval=3, **settings),
        ]
        train.main()
    sys.argv = argv
    return folder


def test_a_run_learns_and_leaves_its_record(trained):
    for name in ("normal", "stochastic", "fusedkv"):
        out = trained / name
        val = read_log(out, "val_loss")
        assert list(val) == [0, 20, 40, 60] and val[0] == pytest.approx(6.24, abs=0.2)  # ln 512
        assert val[60] < val[20] < val[0] - 0.5
        row = json.loads((out / "log.jsonl").read_text().splitlines()[3])
        assert {"step", "train_loss", "lr", "tokens", "tokens_per_s", "time"} <= set(row)
        assert json.loads((out / "config.json").read_text())["n_layer"] == 4
        info = json.loads((out / "run.json").read_text())
        assert info["dtype"] == "torch.float32" and info["command"].startswith("train.py --n_layer=4")
        model, config = load_run(out)
        assert info["parameters"] == sum(p.numel() for p in model.parameters())
        tokens = Tokens(f"{config.data_dir}/{config.dataset}", "val", 32)
        again = window_losses(model, tokens, 16, 5).mean()
        goal = read_log(out, "val_loss_routed") if name == "stochastic" else val
        best = min(goal, key=goal.get)  # best.pt is that step's, whatever the batch size
        assert again == pytest.approx(val[best], abs=1e-5)


def test_stochastic_runs_log_their_draws(trained):
    drawn = read_log(trained / "stochastic", "plans")
    plans = [plan for line in drawn.values() for plan in line]  # of every step, though lines are rarer
    assert len(drawn) == 22 and len(plans) == 60  # every 3 steps, and before every evaluation
    router = StochasticRouter(4, 0.5, seed=0)
    assert plans == [router.plan(step).spec for step in range(60)]
    assert not read_log(trained / "normal", "plans")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router_p": 0.5, "gradient_accumulation_steps": 2},
        {"plan": "fusedkv"},
        {"plan": "0_0_k0v0+1_2", "seed": 3},
    ],
)
def test_resuming_continues_the_same_run(corpus, tmp_path, script, settings):
    """Stopped at step 6 and resumed equals never stopped: the same losses and weights, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script("train.py", *flags(corpus, whole, **settings))

    def stop_at_6(step, c, schedule=train.learning_rate):
        if step == 6:
            raise KeyboardInterrupt
        return schedule(step, c)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_at_6)
        assert script("train.py", *flags(corpus, parts, **settings))[0] == 130
    status, out, _ = script("train.py", "--out_dir", parts, "--init_from=resume")
    assert status == 0 and "resumed after step 6" in out
    for key in ("train_loss", "val_loss", "val_loss_routed", "lr", "plans"):
        assert read_log(parts, key) == read_log(whole, key)
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["best_val_loss"] == b["best_val_loss"]


def test_ctrl_c_saves_and_says_how_to_go_on(corpus, tmp_path, script):
    out, pressed = tmp_path / "run", []

    def press_at_2(step, c, schedule=train.learning_rate):
        if step == 2 and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, c)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", press_at_2)
        status, text, _ = script("train.py", *flags(corpus, out))
    assert status == 130 and "saved after step 3; go on" in text
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 3
    assert script("train.py", f"--out_dir={out}", "--init_from=resume")[0] == 0
    assert list(read_log(out, "train_loss")) == list(range(1, 13))


def test_resuming_a_finished_run_changes_nothing_and_more_steps_extend_it(corpus, tmp_path, script):
    out = tmp_path / "run"
    script("train.py", *flags(corpus, out))
    before = (out / "log.jsonl").read_text(), (out / "ckpt.pt").read_bytes()
    assert script("train.py", f"--out_dir={out}", "--init_from=resume")[0] == 0
    assert before == ((out / "log.jsonl").read_text(), (out / "ckpt.pt").read_bytes())
    assert script("train.py", f"--out_dir={out}", "--init-from=resume", "--max-iters", "15")[0] == 0
    assert list(read_log(out, "train_loss")) == list(range(1, 16))


def test_accumulation_equals_one_large_batch(corpus, tmp_path, script):
    losses = []
    for batch, steps in ((8, 1), (4, 2)):
        out = tmp_path / str(batch)
        script(
            "train.py", *flags(corpus, out, batch_size=batch, gradient_accumulation_steps=steps, max_iters=4)
        )
        losses.append(list(read_log(out, "train_loss").values()))
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def torchrun(n: int, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "train.py", *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"optimizer": "muon", "router_p": 0.5}])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_train_as_one(corpus, tmp_path, script, settings, sharded):
    """The same losses step by step and the same final weights, where the first six steps ran on two ranks and
    the rest on one, or the other way round."""
    two, rest = tmp_path / "two", [f"--out_dir={tmp_path / 'two'}", "--init_from=resume", "--max_iters=12"]
    common = {"max_iters": 12, "learning_rate": 1e-3, "min_lr": 1e-3, "warmup_iters": 0}  # no schedule
    assert script("train.py", *flags(corpus, tmp_path / "flat", **settings | common))[0] == 0
    half = flags(corpus, two, **settings | common | {"max_iters": 6})
    if sharded:
        assert script("train.py", *half)[0] == 0
        done = torchrun(2, *rest, "--shard")
    else:
        done = torchrun(2, *half)
        assert done.returncode == 0, done.stderr
        assert script("train.py", *rest)[0] == 0
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best val") == 1  # one rank speaks
    for key in ("train_loss", "val_loss"):
        expected, got = read_log(tmp_path / "flat", key), read_log(two, key)
        assert list(got) == list(expected)
        assert list(got.values()) == pytest.approx(list(expected.values()), abs=2e-5)
    a, b = (load_checkpoint(folder / "ckpt.pt")["model"] for folder in (tmp_path / "flat", two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)


def test_settings_for_ranks(corpus, tmp_path, refused, monkeypatch):
    line = refused("train.py", *flags(corpus, tmp_path / "a"), "--shard")
    assert "--shard splits a model over several devices; start it with torchrun" in line
    monkeypatch.setattr("support.parallel.RANKS", 3)
    line = refused("train.py", *flags(corpus, tmp_path / "a"))
    assert "--batch_size 8 cannot be divided among 3 ranks" in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonal_comes_close_to_the_polar_factor(shape):
    """Singular values above a hundredth of the bound on the largest come within 0.28 of one."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    y = train.orthogonal(7 * u * torch.logspace(0, -1.5, min(shape[1:])) @ v)
    assert torch.linalg.svdvals(y).sub(1).abs().max() < 0.28
    assert torch.nn.functional.cosine_similarity(y.flatten(1), (u @ v).flatten(1)).min() > 0.97


def test_muon_steps_as_torchs_does(monkeypatch):
    """Momentum, decay and scale, with torch's own way to make a matrix orthogonal in place of ours."""
    from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

    coefficients = (3.4445, -4.775, 2.0315)
    monkeypatch.setattr(
        train, "orthogonal", lambda x: torch.stack([newton_schulz(m, coefficients, 5, 1e-7) for m in x])
    )
    ours, theirs = (
        torch.nn.Parameter(torch.randn(24, 48, generator=torch.Generator().manual_seed(1))) for _ in "12"
    )
    a = train.Muon([ours], 0.02, 0.1, torch.float32)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for step in range(4):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = torch.randn(24, 48, generator=torch.Generator().manual_seed(10 + step))
            optimizer.step()
    moved, expected = ours - before, theirs - before
    assert (moved - expected).norm() < 0.001 * expected.norm()


def test_settings_come_from_toml_and_flags_win(corpus, tmp_path, script, refused):
    toml = tmp_path / "x.toml"
    toml.write_text("n_layer = 3\nlearning_rate = 1\nmax_iters = 2\n")
    given = [f for f in flags(corpus, tmp_path / "run") if not re.match("--(n_layer|max_iters)", f)]
    assert script("train.py", toml, *given, "--max_iters=1")[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["n_layer"], config["learning_rate"], config["max_iters"]) == (3, 1.0, 1)
    for text, part in (
        ("n_layers = 3", "unknown key 'n_layers'; did you mean n_layer?"),
        ("n_layer = '3'", "n_layer = '3' is not a whole number"),
        ("dtype = 'float8'", "is not one of auto, float32, bfloat16"),
        ("n_layer = ", "is not TOML"),
    ):
        toml.write_text(text)
        assert part in refused("train.py", toml)
    assert "cannot read" in refused("train.py", tmp_path / "none.toml")


def test_mistakes_get_one_line_and_leave_nothing(corpus, tmp_path, refused, trained):
    out = tmp_path / "run"

    def bad(**settings):
        return refused("train.py", *flags(corpus, out, **settings))

    assert "no such plan" in bad(plan="nope")
    assert "layer '9' is not valid" in bad(plan="keep:0,9")
    assert "number of KV layers '5' is not valid" in bad(plan="sandwich-top:5")
    assert "backward_passes 0 is not valid" in bad(backward_passes=0)
    assert "forward_passes -1 is not valid" in bad(forward_passes=-1)
    assert "not a probability" in bad(router_p=1.5)
    assert "iterates or fuses" in bad(router_p=0.5, plan="fusedkv")
    assert "router_lowest 4 is not valid; it must be 0 to 3" in bad(router_p=0.5, router_lowest=4)
    assert "must be 1 or more" in bad(batch_size=0)
    assert "n_layer 0 is not valid; it must be 1 to 1000" in bad(n_layer=0)
    assert "not a multiple" in bad(n_head=3)
    assert "--n_layer 'x' is not a whole number" in bad(n_layer="x")
    assert "is not true, false or auto" in bad(compile="maybe")
    assert "--seed -1 is not valid" in bad(seed=-1)
    assert "must be below 1" in bad(beta1=1)
    assert "--learning_rate nan is not valid" in bad(learning_rate="nan")
    assert "n_hidden -5" in bad(n_hidden=-5)
    assert "no corpus 'nope'" in bad(dataset="nope")
    assert "lower --block_size" in bad(block_size=100_000)
    assert "--device cuda:7" in bad(device="cuda:7")
    assert "no checkpoint" in bad(init_from="resume")
    assert "did you mean --n_layer" in refused("train.py", "--n_layers=3")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "file: Not a directory" in refused("train.py", *flags(corpus, tmp_path / "file"))
    used = trained / "normal"
    before = (used / "ckpt.pt").read_bytes()
    assert "holds a run" in refused("train.py", *flags(corpus, used))
    assert "--n_layer 5 contradicts" in refused(
        "train.py", f"--out_dir={used}", "--init_from=resume", "--n_layer=5"
    )
    assert (used / "ckpt.pt").read_bytes() == before


def test_damaged_checkpoints_are_refused(tmp_path, refused, trained):
    out = tmp_path / "run"
    assert "no checkpoint" in refused("sample.py", "--out_dir", out)
    out.mkdir()
    torch.save({"model": {}, "iter_num": 3}, out / "best.pt")
    assert "cannot be read as a checkpoint of nanokv" in refused("sample.py", "--out_dir", out)
    for content in (b"", b"not a checkpoint", (trained / "normal" / "best.pt").read_bytes()[:5000]):
        (out / "best.pt").write_bytes(content)
        assert "cannot be read as a checkpoint" in refused("sample.py", "--out_dir", out)


def test_a_changed_corpus_is_noticed(corpus, tmp_path, script, refused):
    """Another text and a tokenizer of the same size would pass every check of shapes."""
    mine, out = tmp_path / "data" / corpus.name, tmp_path / "run"
    shutil.copytree(corpus, mine)
    given = [f for f in flags(corpus, out, max_iters=2) if "data_dir" not in f] + [
        f"--data_dir={mine.parent}"
    ]
    assert script("train.py", *given)[0] == 0
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    data.prepare(mine, lambda: texts, "bpe:512", "other text")
    more = ("--init_from=resume", "--max_iters=4", f"--out_dir={out}")
    assert "is not the corpus that" in refused("train.py", *more)
    assert "is not the corpus that" in refused("sweep.py", "--out_dir", out)


def test_a_torn_log_line_is_dropped(corpus, tmp_path, script):
    out = tmp_path / "run"
    script("train.py", *flags(corpus, out))
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 1')
    assert script("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=13")[0] == 0
    assert list(read_log(out, "train_loss")) == list(range(1, 14))


def test_a_loss_gone_bad_stops_the_run(corpus, tmp_path, refused):
    out = tmp_path / "run"
    line = refused("train.py", *flags(corpus, out, learning_rate=1e12, grad_clip=0, max_iters=40))
    assert re.search(r"the loss became (nan|inf) by step \d+; .* lower --learning_rate", line)


def test_a_run_gone_bad_continues_with_a_lower_learning_rate(corpus, tmp_path, script, refused):
    """What the error advises can be done, and the steps that went bad leave no trace."""
    out, twin = tmp_path / "run", tmp_path / "twin"
    assert script("train.py", *flags(corpus, out, max_iters=6, grad_clip=0))[0] == 0
    shutil.copytree(out, twin)
    resume = ("train.py", "--init_from=resume", "--max_iters=12", "--eval_interval=3")
    line = refused(*resume, f"--out_dir={out}", "--learning_rate=1e12", "--min_lr=1e12")
    assert re.search(r" became (nan|inf)", line)
    assert f"the last good checkpoint is {out / 'ckpt.pt'} of step 6; lower --learning_rate" in line
    line = refused(*resume, f"--out_dir={out}", "--learning_rate=1e-4")
    assert "--min_lr 0.0005 is above --learning_rate 0.0001; lower it too" in line
    for folder in (out, twin):
        lower = ("--learning_rate=1e-3", "--min_lr=1e-4", f"--out_dir={folder}")
        status, text, _ = script(*resume, *lower)
        assert status == 0 and "resumed after step 6" in text
        assert "--learning_rate 0.001 in place of 0.005" in text
        assert "--min_lr 0.0001 in place of 0.0005" in text
    rates = read_log(out, "lr")
    assert list(rates) == list(range(1, 13)) and rates[2] > 3e-3 > 1e-3 > rates[7] > rates[12] > 1e-4
    for key in ("train_loss", "val_loss", "lr"):
        assert read_log(out, key) == read_log(twin, key)
    a, b = (load_checkpoint(folder / "ckpt.pt") for folder in (out, twin))
    assert a["step"] == 12 and all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 1e-3


def test_a_resumed_run_keeps_what_it_started_from(corpus, tmp_path, script):
    pytest.importorskip("safetensors")
    script("train.py", *flags(corpus, tmp_path / "scratch", max_iters=2))
    script("support/hf.py", tmp_path / "scratch", tmp_path / "folder")
    sizes = ("n_layer", "n_embd", "n_head", "n_kv_head")
    given = flags(corpus, tmp_path / "tuned", init_from=f"hf:{tmp_path / 'folder'}", max_iters=2)
    assert (
        script("train.py", *(f for f in given if not f.startswith(tuple(f"--{s}=" for s in sizes))))[0] == 0
    )
    for name, started in (("scratch", "scratch"), ("tuned", f"hf:{tmp_path / 'folder'}")):
        out = tmp_path / name
        assert script("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=4")[0] == 0
        assert json.loads((out / "config.json").read_text())["init_from"] == started
        assert (
            load_run(out)[1].init_from == load_checkpoint(out / "ckpt.pt")["config"]["init_from"] == started
        )


def test_speed_in_the_log_is_of_recent_steps(corpus, tmp_path, script, monkeypatch):
    """A slow first step, as when kernels are compiled, is soon forgotten."""

    def slow_at_0(step, c, schedule=train.learning_rate):
        time.sleep(3 if step == 0 else 0)
        return schedule(step, c)

    monkeypatch.setattr(train, "learning_rate", slow_at_0)
    out = tmp_path / "run"
    assert script("train.py", *flags(corpus, out))[0] == 0
    speed, seconds = read_log(out, "tokens_per_s"), read_log(out, "time")
    tokens_per_step = SMALL["batch_size"] * SMALL["block_size"]
    assert speed[1] < tokens_per_step / 3
    assert speed[12] > 2 * 12 * tokens_per_step / seconds[12]


def test_a_file_system_without_locks(corpus, tmp_path, script, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def not_implemented(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    status, _, err = script("train.py", *flags(corpus, tmp_path / "run", max_iters=2))
    assert status == 0 and list(read_log(tmp_path / "run", "train_loss")) == [1, 2]
    assert len(err.splitlines()) == 1 and "cannot be locked" in err


@pytest.mark.parametrize(
    "settings", [{"qk_norm": True}, {"router_p": 0.5}, {"plan": "fusedkv"}, {"plan": "pizza-top:2"}]
)
def test_bfloat16_training_follows_float32(corpus, tmp_path, script, settings):
    losses = []
    for dtype in ("float32", "bfloat16"):
        script("train.py", *flags(corpus, tmp_path / dtype, dtype=dtype, **settings))
        losses.append(list(read_log(tmp_path / dtype, "train_loss").values()))
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and losses[0] != losses[1]


def test_layers_below_the_lowest_are_read_by_themselves_alone(corpus, tmp_path, script):
    out = tmp_path / "run"
    status, _, err = script("train.py", *flags(corpus, out, router_p=0.9, router_lowest=1))
    assert status == 0, err
    plans = [Plan.parse(spec, 4) for drawn in read_log(out, "plans").values() for spec in drawn]
    assert len(set(plans)) > 3
    assert all(route.k != (0,) for plan in plans for route in plan.routes[1:])
    # and that is what a sweep, a search and `auto:` then deploy
    assert script("sweep.py", "--out_dir", out, "--windows", 2)[0] == 0
    swept = [json.loads(line)["plan"] for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert "keep:0,1" in swept and "keep:0" not in swept
    assert script("sweep.py", "--out_dir", out, "--windows", 2, "--search", "--plans", "auto:0.5")[0] == 0
    rows = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    found = [Plan.parse(row["plan"], 4) for row in rows]
    assert len(found) == 6 and all(plan.k_layers[:2] == (0, 1) for plan in found)


@pytest.mark.parametrize("value", [False, True])
def test_runs_of_earlier_versions(value, trained, tmp_path, script, refused):
    """They may say key_residual, which is refused where it is true; moments of another form are not taken."""
    out = tmp_path / "run"
    shutil.copytree(trained / "normal", out)
    for name in ("best.pt", "ckpt.pt"):
        checkpoint = torch.load(out / name, weights_only=True)
        checkpoint["config"] |= {"sample_interval": 0, "key_residual": value}
        checkpoint["model_config"]["key_residual"] = value
        checkpoint["optimizer"] = {"state": {}, "param_groups": []}
        torch.save(checkpoint, out / name)
    sample = ("sample.py", "--out_dir", out, "--max_new_tokens", 2)
    if value:
        assert "has key_residual, which this version does not have" in refused(*sample)
    else:
        assert script(*sample)[0] == 0
        line = refused("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=70")
        assert "does not hold the state of this optimizer" in line and "init_from=hf:" in line


def test_sweep_scores_draws_and_overlays(trained, tmp_path, script, refused):
    runs = [trained / name for name in ("normal", "stochastic", "fusedkv")]
    status, out, _ = script("sweep.py", "--out_dir", *runs, "--windows", 20, "--save_dir", tmp_path)
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert (tmp_path / "cache_vs_loss.png").read_bytes()[:4] == b"\x89PNG"
    keys = {"run", "plan", "cache_ratio", "cache_bytes_per_token", "loss", "loss_stderr", "bpb", "tokens"}
    assert all(keys <= set(row) and row["tokens"] == 20 * 32 for row in rows)
    by_run = {
        name: [r["plan"] for r in rows if r["run"] == name] for name in ("normal", "stochastic", "fusedkv")
    }
    ladder = ["full", "keep:0,1,2", "keep:0,2", "keep:0", "keep:0,1", "fusedkv-lite"]
    assert by_run == {"normal": ladder, "stochastic": ladder, "fusedkv": ["fusedkv"]}
    normal = {r["plan"]: r for r in rows if r["run"] == "normal"}
    assert normal["full"]["delta"] == 0 and normal["keep:0"]["delta_stderr"] > 0
    assert normal["keep:0"]["cache_bytes_per_token"] == normal["full"]["cache_bytes_per_token"] / 4
    # the paired error, computed again
    model, config = load_run(trained / "normal")
    tokens = Tokens(f"{config.data_dir}/{config.dataset}", "val", 32)
    a, b = (window_losses(model, tokens, 20, 7, model.resolve(plan)) for plan in ("keep:0", "full"))
    assert normal["keep:0"]["loss"] == pytest.approx(a.mean(), abs=1e-5)
    assert normal["keep:0"]["delta_stderr"] == pytest.approx((a - b).std(ddof=1) / 20**0.5, rel=1e-3)
    # by default the files go beside the runs
    assert script("sweep.py", "--out_dir", *runs[:2], "--plans", "full", "--windows", 2)[0] == 0
    assert (trained / "sweep.jsonl").exists()
    status, out, _ = script("sweep.py", "--out_dir", *runs[1:], "--plans", "cla:2", "fusedkv", "--windows", 2)
    assert status == 0 and out.count("left out:") == 2
    assert "no gates" in refused("sweep.py", "--out_dir", runs[0], "--plans", "fusedkv")
    for some in (runs[:1], runs):
        assert "no such plan" in refused("sweep.py", "--out_dir", *some, "--plans", "full", "nope")
    assert "no checkpoint" in refused("sweep.py", "--out_dir", tmp_path / "none")


def test_curves_of_runs(trained, corpus, tmp_path, script, refused):
    runs = [trained / name for name in ("normal", "stochastic")]
    status, out, _ = script("sweep.py", "--out_dir", *runs, "--curves", "--save_dir", tmp_path / "a")
    assert status == 0 and f"wrote {tmp_path / 'a' / 'curves.png'}" in out
    assert (tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert script("sweep.py", "--out_dir", *runs, "--curves")[0] == 0
    assert (trained / "curves.png").exists()  # by default beside the runs
    assert script("sweep.py", "--out_dir", runs[0], "--curves")[0] == 0
    assert (runs[0] / "curves.png").exists()
    line = refused("sweep.py", "--out_dir", runs[0], tmp_path, "--curves")
    assert f"cannot read {tmp_path / 'log.jsonl'}" in line and "takes the folders of runs" in line
    unevaluated = tmp_path / "unevaluated"  # but at step 0
    script("train.py", *flags(corpus, unevaluated, max_iters=0))
    assert script("sweep.py", "--out_dir", runs[0], unevaluated, "--curves", "--save_dir", tmp_path)[0] == 0


@pytest.mark.parametrize(
    "flag, reason", [("--compile=False", "as asked"), ("--compile=auto", "pays in runs")]
)
def test_compiling_can_be_asked_for(corpus, tmp_path, script, flag, reason):
    status, out, err = script("train.py", *flags(corpus, tmp_path / "run", max_iters=1), flag)
    assert status == 0 and f"not compiled ({reason}" in out, err


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid(path):
    TrainConfig(**read_toml(path, TrainConfig))


def test_a_missing_compiler_is_named(trained, refused, script, monkeypatch):
    monkeypatch.setattr(devices, "why_not_compile", lambda device: "no g++")
    out = trained / "stochastic"
    needs = "compiling fails here (no g++); fix that, or "
    assert needs + "leave --compile out" in refused("sample.py", "--out_dir", out, "--compile")
    assert needs + "add --no_compile" in refused("lab/bench.py", "--out_dir", out, "--plans", "full")
    assert script("sample.py", "--out_dir", out, "--max_new_tokens", 2)[0] == 0


@pytest.mark.parametrize("how", [[], ["--compile"]])
def test_sample_streams_the_same_text_that_generate_gives(trained, tmp_path, script, how):
    out = trained / "stochastic"
    flags = ("--out_dir", out, "--max_new_tokens", 20, "--seed", 4, "--device", "cpu")
    flags += ("--dtype", "float32")  # as the reference, also where the CPU has bfloat16
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def main")
    status, text, _ = script(
        "sample.py", *flags, *how, "--start", f"FILE:{prompt}", "--plan", "full", "--plan", "cla:2"
    )
    assert status == 0
    model, _ = load_run(out)
    enc = data.load_tokenizer(out)
    idx = torch.tensor([enc.encode_ordinary("def main")])
    for plan, ratio in (("full", "100.0%"), ("cla:2", "50.0%")):
        ids = model.generate(idx, 20, temperature=0.8, top_k=50, plan=plan, seed=4)
        assert f"--- {plan}\n{enc.decode(ids[0].tolist())}" in text.replace("\r", "")
        assert re.search(
            rf"--- {plan}: first token after \d+ ms, then \d+ tokens/s; cache .* \({ratio}\)", text
        )


def test_sample_does_not_break_characters(trained, script, monkeypatch):
    """Bytes of one character arrive as separate tokens; the stream must hold them back until it is whole."""
    out = trained / "normal"
    enc = data.load_tokenizer(out)
    ids = enc.encode_ordinary("日本語 🎉")
    assert len(ids) > 4

    def stream(self, idx, n, **options):
        yield from (torch.tensor([[i]]) for i in ids)

    monkeypatch.setattr(GPT, "stream", stream)
    status, text, _ = script("sample.py", "--out_dir", out, "--device", "cpu", "--max_new_tokens", len(ids))
    assert status == 0 and "日本語 🎉" in text and "\ufffd" not in text


def test_a_sample_ends_where_the_text_does(trained, tmp_path, script, monkeypatch):
    """At the tokenizer's end of text and at a stop token of the model; with --ignore_eot it goes on."""
    out, stop = tmp_path / "run", 7
    shutil.copytree(trained / "normal", out)
    checkpoint = load_checkpoint(out / "best.pt")
    checkpoint["model_config"]["stop_tokens"] = [stop]
    torch.save(checkpoint, out / "best.pt")
    enc = data.load_tokenizer(out)
    for end in (enc.eot_token, stop):
        ids = [*enc.encode_ordinary("alpha"), end, *enc.encode_ordinary("omega")]
        monkeypatch.setattr(GPT, "stream", lambda *a, ids=ids, **k: (torch.tensor([[i]]) for i in ids))
        args = ("--out_dir", out, "--device", "cpu", "--max_new_tokens", len(ids))
        status, text, _ = script("sample.py", *args)
        assert status == 0 and "alpha" in text and "omega" not in text and "<|" not in text
        status, text, _ = script("sample.py", *args, "--ignore_eot")
        assert status == 0 and "alpha" in text and "omega" in text


def test_sample_mistakes(trained, tmp_path, refused):
    out = ("--out_dir", trained / "normal")
    assert "do not fit the context of 32" in refused("sample.py", *out, "--max_new_tokens", 40)
    assert "do not fit the context" in refused(
        "sample.py", *out, "--start", "word " * 50, "--max_new_tokens", 4
    )
    assert "no gates" in refused("sample.py", *out, "--plan", "fusedkv", "--max_new_tokens", 4)
    assert "must be 1 or more" in refused("sample.py", *out, "--num_samples", 0)
    assert "must be 0.0 or more" in refused("sample.py", *out, "--temperature", -1)
    assert "No such file" in refused("sample.py", *out, "--start", "FILE:none", "--max_new_tokens", 4)
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(
        "sample.py", *out, "--start", f"FILE:{tmp_path / 'latin'}", "--max_new_tokens", 4
    )


def test_search_finds_plans_and_auto_takes_them(trained, tmp_path, script, refused):
    out = trained / "stochastic"
    assert "--search" in refused(
        "sample.py", "--out_dir", trained / "normal", "--plan", "auto:0.5", "--max_new_tokens", 4
    )
    assert "built for 'fusedkv'" in refused("sweep.py", "--out_dir", trained / "fusedkv", "--search")
    assert script("sweep.py", "--out_dir", out, "--search", "--windows", 16)[0] == 0
    bare = tmp_path / Path(load_run(out)[1].dataset)
    shutil.copytree(Path(load_run(out)[1].data_dir) / bare.name, bare)
    (bare / "train.bin").unlink()
    assert "train.bin" in refused("sweep.py", "--out_dir", out, "--search", "--data_dir", tmp_path)
    rows = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    ratios = [r["cache_ratio"] for r in rows]
    assert ratios == [n / 8 for n in range(8, 1, -1)]  # one tensor a step, from 4 K and 4 V to one of each
    model, config = load_run(out)
    tokens = Tokens(f"{config.data_dir}/{config.dataset}", "train", 32)
    for a, b in zip(rows, rows[1:]):
        old, new = (Plan.parse(r["plan"], 4) for r in (a, b))
        assert set(new.k_layers) <= set(old.k_layers) and set(new.v_layers) <= set(old.v_layers)
        loss = window_losses(model, tokens, 4, 4, new).mean()
        assert b["calibration_loss"] == pytest.approx(loss, abs=1e-4)
    # the first drop is the best of all there are
    full, options = model.plan, []
    for kind in "kv":
        for layer in range(1, 4):
            for source in range(layer):
                routes = list(full.routes)
                routes[layer] = replace(routes[layer], **{kind: (source,)})
                options.append(Plan(tuple(routes)))
    losses = {p: window_losses(model, tokens, 4, 4, p).mean() for p in options}
    nearest = [p for p in options if all(i - min(r.k + r.v) <= 1 for i, r in enumerate(p.routes))]
    assert rows[1]["calibration_loss"] <= min(losses[p] for p in nearest) + 1e-5
    status, text, _ = script("sample.py", "--out_dir", out, "--plan", "auto:0.5", "--max_new_tokens", 4)
    best = min((r for r in rows if r["cache_ratio"] <= 0.5), key=lambda r: r["calibration_loss"])
    assert status == 0 and f"--- {best['plan']}: first token" in text
    for share, part in (("0.1", "the smallest cache found is 0.25 of the full one"), ("half", "could not")):
        assert part in refused("sample.py", "--out_dir", out, "--plan", f"auto:{share}")


def test_fine_tuning_and_conversion_start_from_a_folder(trained, corpus, tmp_path, script, refused):
    """A normal run written as a Hugging Face folder, read back, converted, tuned with routing, resumed."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "folder"
    assert script("support/hf.py", trained / "normal", folder)[0] == 0
    before, _ = load_run(trained / "normal")
    init = [
        f"--data_dir={corpus.parent}",
        f"--dataset={corpus.name}",
        f"--init_from=hf:{folder}",
        "--block_size=32",
    ]
    init += ["--batch_size=8", "--eval_iters=2", "--device=cpu", "--dtype=float32"]
    losses = {}
    for plan in ("full", "fusedkv", "fusedkv-lite"):
        out = tmp_path / plan
        assert (
            script(
                "train.py", *init, f"--plan={plan}", "--max_iters=0", "--fit_tokens=0", f"--out_dir={out}"
            )[0]
            == 0
        )
        losses[plan] = read_log(out, "val_loss")[0]
        model, config = load_run(out)
        assert model.plan.spec == plan and config.n_layer == 4
    assert losses["full"] == pytest.approx(min(read_log(trained / "normal", "val_loss").values()), abs=1e-4)
    assert losses["fusedkv"] == pytest.approx(losses["fusedkv-lite"], abs=1e-5)  # where its gates start
    tuned = tmp_path / "tuned"
    flags = [
        "--router_p=0.5",
        "--router_lowest=1",
        "--max_iters=4",
        "--log_interval=1",
        f"--out_dir={tuned}",
        "--learning_rate=1e-3",
    ]
    assert script("train.py", *init, *flags)[0] == 0
    assert script("train.py", f"--out_dir={tuned}", "--init_from=resume", "--max_iters=6")[0] == 0
    assert len(read_log(tuned, "plans")) == 6
    other = ("--init_from=hf:" + str(folder), f"--out_dir={tmp_path / 'x'}")
    assert "--n_layer 5 contradicts" in refused("train.py", *other, "--n_layer=5")
    assert "is not valid; it is scratch, resume or hf:FOLDER" in refused("train.py", "--init_from=gpt2")
    assert "cannot read" in refused("train.py", f"--init_from=hf:{tmp_path}", f"--out_dir={tmp_path / 'x'}")
    big = tmp_path / "data" / "big"
    data.prepare(big, lambda: [path.read_text() for path in [Path(__file__)]], "bpe:600", "this file")
    more = ("--dataset=big", f"--data_dir={big.parent}", "--block_size=32")
    assert "a vocabulary of 600" in refused("train.py", *other, *more)


def test_a_tokenizer_json_serves_data_training_and_sampling(corpus, tmp_path, script):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat — 日本語 " * 9], vocab_size=300, special_tokens=["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on 日本語 🎉\n" * 200)
    into = (
        "--input",
        text,
        "--name",
        "x",
        "--data_dir",
        tmp_path,
        "--tokenizer",
        tmp_path / "tokenizer.json",
    )
    assert script("data.py", *into)[0] == 0
    enc = data.load_tokenizer(tmp_path / "x")
    sample = "the cat — 日本 🎉\n\tx"
    assert (
        enc.decode(enc.encode_ordinary(sample)) == sample == enc.tokenizer.decode(enc.encode_ordinary(sample))
    )
    out = tmp_path / "run"
    data_flags = (f"--data_dir={tmp_path}", "--dataset=x", f"--out_dir={out}")
    given = [f for f in flags(corpus, out, max_iters=2) if "data" not in f and "out_dir" not in f]
    assert script("train.py", *given, *data_flags)[0] == 0
    assert script("sample.py", "--out_dir", out, "--start", "the cat", "--max_new_tokens", 5)[0] == 0


# --- what imports what, and what a machine must have ------------------------------------------------------


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function, by the first part of their names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_imports_have_no_cycle_and_none_of_the_lab():
    files = {path.stem: path for path in ROOT.glob("*.py")}
    graph = {name: imports(path) & set(files) for name, path in files.items()}
    assert graph["kv_router"] == set() and {"train", "sample", "sweep"} <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert not [name for name, path in files.items() if "lab" in imports(path)]


def python(code: str, *args, cwd: Path) -> str:
    """What a new process prints that runs `code` with the project on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", ["sample", "train"])
def test_scripts_load_only_what_they_need(script, tmp_path):
    code = f"import {script}, sys; unwanted = {{'matplotlib', 'lm_eval', 'pyarrow', 'datasets'}}; "
    code += "print(sorted(unwanted & set(sys.modules)))"
    assert python(code, cwd=tmp_path).splitlines() == ["[]"]


WITHOUT_UNIX = """
import os, sys
import matplotlib.pyplot, numpy, tiktoken, torch  # they may use on this machine what the project may not
import torch.distributed.device_mesh, torch.distributed.fsdp, torch.distributed.tensor
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("O_NOFOLLOW", "O_DIRECTORY", "fork", "getuid", "sysconf"):
    delattr(os, name)
import data, sample, sweep, train
for command in sys.argv[1].split(";"):
    sys.argv = command.split()
    {"data.py": data, "sample.py": sample, "sweep.py": sweep, "train.py": train}[sys.argv[0]].main()
"""


def test_the_scripts_run_without_what_only_unix_has(corpus, tmp_path):
    (tmp_path / "text.txt").write_text("some words in a row\n" * 300)
    small = ["--n_layer=2", "--n_embd=16", "--n_head=2", "--n_kv_head=1", "--block_size=16", "--batch_size=4"]
    small += ["--eval_iters=1", "--max_iters=2", "--device=cpu", "--dataset=own", "--out_dir=run"]
    commands = [
        "data.py --input text.txt --name own --tokenizer bpe:300",
        " ".join(["train.py", *small]),
        "train.py --out_dir=run --init_from=resume --max_iters=3",
        "sample.py --out_dir run --max_new_tokens 4 --device cpu",
        "sweep.py --out_dir run --windows 2 --device cpu",
    ]
    output = python(WITHOUT_UNIX, ";".join(commands), cwd=tmp_path)
    assert output.count("cannot be locked") == 3 and "best val" in output and "first token after" in output
    assert (tmp_path / "run" / "cache_vs_loss.png").exists()
