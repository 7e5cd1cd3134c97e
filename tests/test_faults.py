"""Kills, full disks, damaged and hostile files: every case must end in a correct continuation or in one
clear error line. `make test` tries a few of each, `pytest -m faults` all, and both say what came of them."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import data
import sweep
import train
from kv_router import Plan, PlanError, StochasticRouter
from model import GPT
from support import cli, hf, runs
from support.cli import UserError
from support.runs import Signals, load_checkpoint, load_run
from train import TrainConfig

import pytest
import torch
from conftest import FAULTS, ROOT
from torch._dynamo.exc import BackendCompilerFailed

pytestmark = pytest.mark.faults
TINY = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "block_size": 16, "batch_size": 4,
    "max_iters": 8, "warmup_iters": 2, "eval_interval": 4, "eval_iters": 1, "log_interval": 3,
    "device": "cpu", "dtype": "float32", "learning_rate": 0.01, "min_lr": 0.001,
}  # fmt: skip


@pytest.fixture
def many(request):
    """many(quick, full): how many cases to try in this call of pytest."""
    return lambda quick, full: full if request.config.option.markexpr == "faults" else quick


def came(kind: str, outcome: str):
    FAULTS.setdefault(kind, Counter())[outcome] += 1


def one_line(e: Exception) -> bool:
    return 10 < len(str(e)) and "\n" not in str(e)


def outcome(script, *args) -> str:
    """What becomes of a script: it does its work or prints one line."""
    status, _, err = script(*args)
    lines = [line for line in err.splitlines() if not re.match(r"\r?(scoring|tokenizing|learning)", line)]
    assert status == 0 or (status == 2 and len(lines) == 1 and "error: " in lines[0]), (args, status, err)
    return "refused" if status else "work"


def flags(corpus: Path, out: Path, **settings) -> list[str]:
    settings = TINY | {"data_dir": corpus.parent, "dataset": corpus.name, "out_dir": out} | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def record(out: Path) -> tuple:
    """All that a run leaves but its times: steps and weights of both checkpoints, losses, plans."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = ("step", "train_loss", "val_loss", "val_loss_routed", "lr", "plans")
    rows = [{k: row[k] for k in keys if k in row} for row in rows]
    states = []
    for name in ("ckpt.pt", "best.pt"):
        if (out / name).exists():
            state = torch.load(out / name, weights_only=True)
            moments = {(i, k): t for i, s in state["optimizer"].items() for k, t in s.items()}
            tensors = state["model"] | moments
            states.append({k: t.numpy().tobytes() for k, t in tensors.items()} | {"step": state["step"]})
            states[-1]["best"] = state["best_val_loss"]
    return rows, states


@contextlib.contextmanager
def at_step(n: int | None, act):
    """Call `act` when this process comes to training step n (0 is the first), once."""
    schedule, waiting = train.learning_rate, [act]

    def learning_rate(step, c):
        if step == n and waiting:
            waiting.pop()()
        return schedule(step, c)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", learning_rate)
        yield


# --- processes: forked from a server that has imported everything, so that a start takes no seconds -------


def _child(argv: list[str], output: str, hold_at: int | None, memory: int | None):
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = argv
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    with at_step(hold_at, lambda: (print("holding", flush=True), time.sleep(60))):
        cli.run(train.main)


@pytest.fixture(scope="module")
def start():
    """start(output file, flags ...) -> a running train.py"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_faults"])

        started = []

        def begin(output, *args, hold_at=None, memory=None):
            argv = ["train.py", *map(str, args)]
            process = context.Process(target=_child, args=(argv, str(output), hold_at, memory))
            process.start()
            started.append(process)
            return process

        yield begin
        for process in started:  # where a test failed before its run had ended
            process.kill()
            process.join()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_kill_9_at_any_moment_loses_nothing(corpus, tmp_path, script, start, many):
    """A run that checkpoints every step, killed and resumed until it is done, equals one never killed."""
    settings = {"router_p": 0.5, "gradient_accumulation_steps": 2, "eval_interval": 1, "max_iters": 25}
    assert script("train.py", *flags(corpus, tmp_path / "whole", **settings))[0] == 0
    whole = record(tmp_path / "whole")
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < many(2, 30):
        out, rounds = tmp_path / f"killed{rounds}", rounds + 1
        init, exitcode = "scratch", None
        while exitcode != 0:
            init = "resume" if any(out.glob("*.pt")) else "scratch"
            process = start(tmp_path / "output", *flags(corpus, out, init_from=init, **settings))
            process.join(rng.uniform(0.05, 1.0) if kills < many(2, 30) else 60)
            process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
            if exitcode:
                kills += 1
                came("kill -9", "resumed to the same result")
        assert record(out) == whole and not list(out.glob("*.tmp"))
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_one_run_a_folder_and_two_signals(corpus, tmp_path, refused, script, start):
    """A second run in the folder is refused while the first is at work, and not after it was killed. The
    first of two signals is obeyed after the step, the second at once."""
    out, text = tmp_path / "run", tmp_path / "output"
    process = start(text, *flags(corpus, out, eval_interval=1), hold_at=2)
    wait_for(lambda: text.exists() and "holding" in text.read_text())
    assert "another run is at work" in refused("train.py", *flags(corpus, out, init_from="resume"))
    came("two runs in one folder", "refused")
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "press again to quit immediately" in text.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT
    came("two signals", "left at once")
    assert script("train.py", *flags(corpus, out, init_from="resume", eval_interval=1))[0] == 0
    assert script("train.py", *flags(corpus, tmp_path / "whole", eval_interval=1))[0] == 0
    assert record(out) == record(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(corpus, tmp_path, number, start):
    out, text = tmp_path / "run", tmp_path / "output"
    process = start(text, *flags(corpus, out, max_iters=100_000, log_interval=1))
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 2000)
    os.kill(process.pid, number)
    process.join(30)
    output = text.read_text()
    assert process.exitcode == 128 + number and "Traceback" not in output, output
    step = int(re.search(r"stopped and saved after step (\d+); go on: python train.py", output)[1])
    assert load_checkpoint(out / "ckpt.pt")["step"] == step
    came(f"{number.name} to a process", "saved")


def test_ctrl_c_that_stops_the_compiler_too_is_no_error():
    """A terminal sends Ctrl-C to g++ as well, and torch then says that compiling failed."""
    for signals, raised in ((1, KeyboardInterrupt), (0, BackendCompilerFailed)):
        with pytest.raises(raised), Signals():
            if signals:
                os.kill(os.getpid(), signal.SIGINT)
            raise BackendCompilerFailed("inductor", RuntimeError("g++ died"), None)


@pytest.mark.parametrize("fault", ["SIGTERM to torchrun", "kill -9 of one rank of two"])
def test_two_ranks(corpus, tmp_path, script, fault):
    """A polite stop saves, whichever rank heard of it first; a dead rank ends the run, without a hang."""
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    settings = flags(corpus, out, max_iters=100_000, log_interval=1, eval_interval=20)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
    ]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *settings], cwd=ROOT, env=environment, **pipe) as process:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 30)
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        ranks = [int(pid) for pid in Path(children).read_text().split()]
        if "kill" in fault:
            os.kill(ranks[-1], signal.SIGKILL)
        else:
            process.terminate()
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    step = load_checkpoint(out / "ckpt.pt")["step"]
    if "kill" not in fault:
        assert 'train.py", line' not in output, output  # no traceback but torchrun's own
        assert f"stopped and saved after step {step}; go on: torchrun --standalone" in output, output
    line = [f"--out_dir={out}", "--init_from=resume", f"--max_iters={step + 2}"]
    assert script("train.py", *line)[0] == 0  # on one device
    came(fault, "ended, and went on with one")


# --- runs that stop and go on, in this process ------------------------------------------------------------

RUNS = [
    {"router_p": 0.5, "gradient_accumulation_steps": 2},
    {"plan": "fusedkv", "n_layer": 4},
    {"plan": "sandwich-top:3", "n_layer": 4, "forward_passes": 2},
    {"router_p": 0.5, "plan": "shared-v", "n_layer": 4, "seed": 3},
]


@pytest.mark.parametrize("settings", RUNS)
def test_stopped_at_any_step_and_resumed(corpus, tmp_path, script, settings, many):
    script("train.py", *flags(corpus, tmp_path / "whole", **settings))
    rows, states = record(tmp_path / "whole")
    steps = list(range(8)) if many(0, 1) else random.Random(str(settings)).sample(range(8), 2)
    for step in steps:
        out = tmp_path / f"stopped{step}"
        with at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert script("train.py", *flags(corpus, out, **settings))[0] == 130
        assert step + 1 in [row["step"] for row in record(out)[0]]  # the line that was not due yet
        assert script("train.py", f"--out_dir={out}", "--init_from=resume")[0] == 0
        again, state = record(out)
        plans = [sum((row.get("plans", []) for row in log), []) for log in (rows, again)]
        assert state == states and plans[0] == plans[1]
        extra = [row["step"] for row in again if row["step"] == step + 1]
        strip = [{k: v for k, v in row.items() if k != "plans"} for row in again]
        wanted = [{k: v for k, v in row.items() if k != "plans"} for row in rows]
        assert [row for row in strip if row in wanted] == wanted and len(strip) <= len(wanted) + len(extra)
        came("stop and resume", "the same result")

    def crash():
        raise KeyboardInterrupt  # as a kill would, without a last save

    with at_step(6, crash):
        script("train.py", *flags(corpus, tmp_path / "crashed", **settings))
    assert script("train.py", f"--out_dir={tmp_path / 'crashed'}", "--init_from=resume")[0] == 0
    assert record(tmp_path / "crashed") == (rows, states)
    came("crash and resume", "the same result")


def test_settings_that_contradict_a_checkpoint(corpus, tmp_path, script, refused):
    out = tmp_path / "run"
    script("train.py", *flags(corpus, out, max_iters=0))
    again = ("train.py", f"--out_dir={out}", "--init_from=resume")
    for setting in ("n_layer=3", "plan=yoco", "seed=9", "weight_decay=0.5", "batch_size=2", "eval_iters=2"):
        assert re.match(r".*--\w+ \S+ contradicts .*ckpt.pt, which has", refused(*again, "--" + setting))
        came("contradiction on resume", "refused")
    status, text, _ = script(*again, "--max_iters=8", "--log_interval=2", "--learning_rate=0.5")
    assert status == 0 and "--max_iters 8 in place of 0" in text
    assert "--log_interval 2 in place of 3" in text and "--learning_rate 0.5 in place of 0.01" in text
    assert [row["step"] for row in record(out)[0]] == [0, 2, 4, 4, 6, 8, 8]  # the one of step 0, too
    came("contradiction on resume", "reported")


@pytest.fixture
def interrupted(corpus, tmp_path, script):
    """A run of 8 steps, whole, and the folder of another that was stopped after step 6."""
    script("train.py", *flags(corpus, tmp_path / "whole", log_interval=1))
    with at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT)):
        script("train.py", *flags(corpus, tmp_path / "run", log_interval=1))
    return tmp_path / "whole", tmp_path / "run"


def test_the_newest_good_checkpoint_is_taken(interrupted, script, refused):
    whole, out = interrupted
    good = (out / "ckpt.pt").read_bytes()
    assert load_checkpoint(out / "best.pt")["step"] == 4
    for bad in (b"", good[:-30], good[:4000] + bytes(200) + good[4200:], (whole / "meta.json").read_bytes()):
        (out / "ckpt.pt").write_bytes(bad)
        copy = out.with_name("copy")
        shutil.copytree(out, copy)
        status, text, err = script("train.py", f"--out_dir={copy}", "--init_from=resume")
        assert status == 0 and "resumed after step 4, from" in text and record(copy) == record(whole)
        assert re.search(r"ckpt.pt cannot be read .*; falling back to \S*best.pt of step 4", err)
        shutil.rmtree(copy)
        came("damaged ckpt.pt", "best.pt taken")
    (out / "ckpt.pt").write_bytes(good)
    copy = shutil.copytree(out, out.with_name("copy"))
    shutil.copy(whole / "best.pt", copy)  # killed between the two: best.pt is newer
    step = load_checkpoint(copy / "best.pt")["step"]
    status, text, _ = script("train.py", f"--out_dir={copy}", "--init_from=resume", f"--max_iters={step}")
    assert status == 0 and f"all {step} steps are done" in text
    assert load_checkpoint(copy / "ckpt.pt")["step"] == step
    shutil.copy(out / "ckpt.pt", copy)
    status, text, err = script("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=9")
    assert status == 0 and "resumed after step 8, from" in text and "ckpt.pt is missing or older" in err
    came("older ckpt.pt", "best.pt taken")
    (out / "ckpt.pt").unlink()
    assert "holds a run" in refused("train.py", *flags(out, out))
    shutil.copy(out / "best.pt", out / "ckpt.pt")
    (out / "best.pt").write_bytes(good[:-30])
    status, _, err = script("sample.py", "--out_dir", out, "--max_new_tokens", 4, "--device", "cpu")
    assert status == 0 and re.search(r"best.pt cannot be read .*; falling back to \S*ckpt.pt of step 4", err)
    came("damaged best.pt", "ckpt.pt taken")
    (out / "ckpt.pt").write_bytes(good[:-30])
    assert "cannot be read" in refused("train.py", f"--out_dir={out}", "--init_from=resume")
    came("both damaged", "refused")


def test_a_full_disk(corpus, tmp_path, script, refused):
    """No file may grow beyond a limit from step 5 on: the save fails, and the one before it is whole."""
    assert script("train.py", *flags(corpus, tmp_path / "whole"))[0] == 0
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))):
            line = refused("train.py", *flags(corpus, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(
        r"cannot save step 8 to .*: File too large; .* ckpt.pt of step 4;", line.replace("/", " ")
    )
    assert not list(out.glob("*.tmp"))
    assert [load_checkpoint(out / name)["step"] for name in ("ckpt.pt", "best.pt")] == [4, 4]
    assert script("train.py", f"--out_dir={out}", "--init_from=resume")[0] == 0
    assert record(out) == record(tmp_path / "whole")
    came("full disk", "refused, then the same result")


def test_a_full_tmpfs(corpus, tmp_path, script, refused, many):
    """A real full disk, where the machine lets us mount one."""
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    settings = {"n_embd": 64, "eval_interval": 1, "log_interval": 1}
    assert script("train.py", *flags(corpus, whole, **settings))[0] == 0
    size = (whole / "ckpt.pt").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", disk]
    if not many(0, 1) or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only with -m faults, and only where tmpfs can be mounted")
    try:
        line = refused("train.py", *flags(corpus, disk / "run", **settings))
        assert "No space left on device; the last good checkpoint is" in line
        came("full tmpfs", "refused")
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
        assert script("train.py", f"--out_dir={disk / 'run'}", "--init_from=resume")[0] == 0
        assert record(disk / "run") == record(whole)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "Read-only file system" in refused("train.py", *flags(corpus, disk / "other"))
        more = (f"--out_dir={disk / 'run'}", "--init_from=resume", "--max_iters=9")
        assert "Read-only file system" in refused("train.py", *more)
        came("read-only folder", "refused")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_vanishes_or_cannot_be_written(corpus, tmp_path, script, refused):
    out = tmp_path / "run"
    with at_step(5, lambda: shutil.rmtree(out)):
        line = refused("train.py", *flags(corpus, out))
    assert "was removed, or is another run's now; no checkpoint is there" in line
    for folder in ("/proc/nanokv", "/proc/self", "/dev/null/x"):
        assert folder in refused("train.py", *flags(corpus, folder))
        came("no output folder", "refused")
    (tmp_path / "victim").write_text("precious")
    out.mkdir()
    names = ("run.json", "log.jsonl", "config.json", "meta.json", "ckpt.pt.tmp", "run.lock")
    for name in names:
        (out / name).symlink_to(tmp_path / "victim")  # a folder from elsewhere can hold links
    assert script("train.py", *flags(corpus, out))[0] == 0
    assert (tmp_path / "victim").read_text() == "precious"
    assert [name for name in names if (out / name).is_symlink()] in ([], ["run.lock"])  # which has no content
    assert record(out)[1]
    came("link out of the folder", "replaced")


@pytest.mark.parametrize("what", ["loss", "gradient norm", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_gone_bad(corpus, tmp_path, script, refused, what, value, monkeypatch):
    """Named with its step and plan; the checkpoint before it stays, and leads to the undamaged result."""
    settings = {"router_p": 0.5, "gradient_accumulation_steps": 2, "log_interval": 4}
    script("train.py", *flags(corpus, tmp_path / "whole", **settings))
    out, calls = tmp_path / "run", itertools.count(1)
    clip, forward = torch.nn.utils.clip_grad_norm_, GPT.forward

    def spoil(parameters, limit):
        parameters = list(parameters)
        step = next(calls)
        if step == 6:
            tensor = parameters[0].data if what == "weights" else parameters[0].grad
            tensor.view(-1)[0] = value
            if what == "weights":
                os.kill(os.getpid(), signal.SIGINT)  # saves before a loss can show it
        return clip(parameters, limit)

    def spoiled(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        return logits, loss * (value if self.training and next(calls) == 12 else 1)

    with pytest.MonkeyPatch.context() as patch:
        if what == "loss":
            patch.setattr(GPT, "forward", spoiled)
        else:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
        line = refused("train.py", *flags(corpus, out, **settings))
    plans = ", ".join(StochasticRouter(2, 0.5, 0).plan(i).spec for i in (10, 11))
    wanted = {"weights": "the weights became infinite or nan by step 6;"}
    assert wanted.get(what, f"the {what} became {value} by step 6; plan: {plans};") in line
    assert f"the last good checkpoint is {out / 'ckpt.pt'} of step 4; lower --learning_rate" in line
    assert script("train.py", f"--out_dir={out}", "--init_from=resume")[0] == 0
    assert record(out)[1] == record(tmp_path / "whole")[1]
    came(f"{what} gone bad", "named, then the same result")


def test_a_clock_that_jumps(corpus, tmp_path, script, monkeypatch):
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.choice([-1e6, -10, 0, 10, 1e6]))
    assert script("train.py", *flags(corpus, tmp_path / "run"))[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 100
    assert all(0 < row["tokens_per_s"] < 1e7 for row in rows if "tokens_per_s" in row)
    came("clock that jumps", "right rates")


def test_a_coarse_clock(corpus, tmp_path, script, monkeypatch):
    """A step can take less time than the clock resolves: on Windows, 16 milliseconds."""
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() // 0.5 * 0.5)
    assert script("train.py", *flags(corpus, tmp_path / "run", log_interval=1))[0] == 0
    came("coarse clock", "trained")


@pytest.mark.parametrize("plan", ["full", "fusedkv", "1_1"])
def test_a_context_of_one_token(corpus, tmp_path, script, refused, plan):
    out = tmp_path / "run"
    assert script("train.py", *flags(corpus, out, block_size=1, plan=plan))[0] == 0
    assert all(math.isfinite(row.get("val_loss", 0)) for row in record(out)[0])
    assert script("sweep.py", "--out_dir", out, "--windows", 4, "--device", "cpu")[0] == 0
    assert "do not fit the context of 1" in refused("sample.py", "--out_dir", out, "--max_new_tokens", 1)
    came("context of one token", "trained, swept, not sampled")


def test_a_corpus_of_one_batch(tmp_path, script, refused):
    data.prepare(tmp_path / "one", lambda: ["abcdefghij\n" * 60], "bytes", "a test")
    n = data.Tokens(tmp_path / "one", "val", 1).n_tokens - 1
    settings = {"block_size": n, "batch_size": data.Tokens(tmp_path / "one", "train", n).n_windows}
    assert script("train.py", *flags(tmp_path / "one", tmp_path / "run", **settings))[0] == 0
    losses = [row["val_loss"] for row in record(tmp_path / "run")[0] if "val_loss" in row]
    assert losses[-1] < losses[0]
    longer = flags(tmp_path / "one", tmp_path / "other", block_size=n + 1)
    assert "too few for a window" in refused("train.py", *longer)
    came("corpus of one batch", "trained")


def test_out_of_memory_is_one_line(corpus, tmp_path, start, refused):
    out, text = tmp_path / "run", tmp_path / "output"
    process = start(text, *flags(corpus, out, batch_size=100_000), memory=500 << 20)
    process.join(60)
    lines = text.read_text().splitlines()
    assert process.exitcode == 2 and "out of memory" in lines[-1] and "lower --batch_size" in lines[-1], lines
    assert "Traceback" not in text.read_text()
    line = refused("train.py", *flags(corpus, out, n_embd=200_000))
    assert re.search("parameters need .* to train and cpu has .*; lower --n_layer or --n_embd", line)
    FAULTS.setdefault("out of memory", Counter())["refused"] += 2


# --- damaged files ----------------------------------------------------------------------------------------


def damaged(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """`raw` cut short, with bits flipped, overwritten, repeated or lost in places, or another file."""
    kind = rng.choice(["cut", "flip", "flip", "flip", "zeros", "noise", "lost", "twice", "longer", "swapped"])
    raw, i = bytearray(raw), rng.randrange(len(raw) + 1)
    n = rng.choice([1, 8, 64, len(raw) // 4])
    if kind == "cut":
        return bytes(raw[: i if i < len(raw) else 0])
    if kind == "swapped":
        return rng.choice(others)
    if kind == "longer":
        return bytes(raw) + rng.choice([bytes(n), rng.randbytes(n), bytes(raw)])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 3])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        raw[i : i + n] = {
            "zeros": bytes(n),
            "noise": rng.randbytes(n),
            "lost": b"",
            "twice": raw[i : i + n] * 2,
        }[kind]
    return bytes(raw)


def weights(model) -> dict:
    return {k: t.numpy().tobytes() for k, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def stock(corpus, tmp_path_factory):
    """Two runs and two corpora that differ only in a seed or a text, a folder of each run, found plans."""
    folder = tmp_path_factory.mktemp("stock")
    texts = [path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))]
    data.prepare(folder / "other", lambda: texts, "bpe:512", "other text")
    argv = sys.argv
    for seed, of in ((0, corpus), (1, folder / "other")):
        for name, plan in (("run", "full"), ("fused", "0_k0+1v0")):
            sys.argv = ["train.py", *flags(of, folder / f"{name}{seed}", seed=seed, plan=plan, max_iters=2)]
            train.main()
        hf.save_hf(load_run(folder / f"fused{seed}")[0], folder / f"hf{seed}")
        out = str(folder / f"run{seed}")
        sys.argv = ["sweep.py", "--out_dir", out, "--search", "--windows=8", "--device=cpu"]
        sweep.main()
    sys.argv = argv
    try:
        import tokenizers
    except ImportError:
        return folder
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    data.prepare(folder / "json", lambda: texts, str(folder / "tokenizer.json"), "other text")
    return folder


def corpus_of(folder: Path):
    """What training reads of a corpus, which is verified first."""
    splits = [data.Tokens(folder, split, 16) for split in data.SPLITS]
    return [(t.path.read_bytes(), t.bytes_per_token, t.meta["vocab_size"]) for t in splits]


def resumed(folder: Path):
    path, checkpoint = runs.find_checkpoint(folder)
    return weights(runs.model_from(path, checkpoint)), checkpoint["config"], checkpoint["step"]


READERS = {  # what has checksums, and text: kind -> folder in stock, file, what reads it
    "ckpt.pt": ("run0", "ckpt.pt", lambda path: resumed(path.parent)),
    "best.pt": ("run0", "best.pt", lambda path: weights(load_run(path.parent)[0])),
    "train.bin": ("corpus", "train.bin", lambda path: corpus_of(path.parent)),
    "val.bin": ("corpus", "val.bin", lambda path: corpus_of(path.parent)),
    "config.toml": ("run0", "config.toml", lambda path: cli.read_toml(path, TrainConfig)),
    "text": ("run0", "text", data.read_text),
}


def encode(enc):
    ids = enc.encode_ordinary("def main(): return 1")
    assert all(0 <= i < enc.n_vocab for i in ids)
    enc.decode(ids)


def evaluate(model: GPT):
    tokens = torch.arange(8).view(1, 8) % model.config.vocab_size
    model.losses(tokens, tokens)


def use_corpus(folder: Path):
    corpus_of(folder)
    for split in ("train", "val"):
        tokens = data.Tokens(folder, split, 16)
        tokens.batch(0, 4, seed=0)
        assert math.isfinite(tokens.bits_per_byte(1.0))
    encode(data.load_tokenizer(folder))


def use_run(folder: Path):
    evaluate(load_run(folder)[0])
    encode(data.load_tokenizer(folder))


def searched(folder: Path):
    model = load_run(folder)[0]
    model.resolve(sweep.auto_plan("auto:0.6", str(folder), model))


USERS = {  # what has no checksum: kind -> folder in stock, file, what uses it
    "meta.json": ("corpus", "meta.json", lambda path: use_corpus(path.parent)),
    "run's meta.json": ("run0", "meta.json", lambda path: use_run(path.parent)),
    "corpus's .tiktoken": ("corpus", "tokenizer.tiktoken", lambda p: encode(data.load_tokenizer(p.parent))),
    "corpus's tokenizer.json": ("json", "tokenizer.json", lambda p: encode(data.load_tokenizer(p.parent))),
    ".tiktoken": ("corpus", "tokenizer.tiktoken", lambda p: encode(data.encoding("x", data.read_ranks(p)))),
    "tokenizer.json": ("json", "tokenizer.json", lambda path: encode(data.JsonTokenizer(path))),
    "search.jsonl": ("run0", "search.jsonl", lambda path: searched(path.parent)),
    "folder's config.json": ("hf0", "config.json", lambda path: evaluate(hf.load_hf(path.parent))),
    "model.safetensors": ("hf0", "model.safetensors", lambda path: evaluate(hf.load_hf(path.parent))),
}


def damage(path: Path, others: list[Path], n: int):
    """Damage a file in n ways, one after the other; yields what it then holds. It can also be swapped for one
    of the others."""
    raw, contents = path.read_bytes(), [other.read_bytes() for other in others if other.exists()]
    rng = random.Random(str(path.name))
    for _ in range(n):
        bad = damaged(rng, raw, contents)
        path.write_bytes(bad)
        yield bad


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(kind, stock, corpus, tmp_path, many):
    """Each is read right, or refused in one line, or something else stands in; never read wrong."""
    source, name, read = READERS[kind]
    shutil.copytree(corpus if source == "corpus" else stock / source, tmp_path / "folder")
    path = tmp_path / "folder" / name
    if kind in ("config.toml", "text"):
        path.write_text('# größe\nn_layer = 4\nlearning_rate = 0.003\nplan = "keep:0,2"\nqk_norm = true\n')
    if path.suffix == ".pt":  # nothing stands in for it
        path.with_name({"ckpt.pt": "best.pt", "best.pt": "ckpt.pt"}[name]).unlink()
    others = [stock / "other" / name, stock / "run0" / "search.jsonl", stock / "hf0" / "model.safetensors"]
    reference = read(path)
    for bad in damage(path, others, many(12, 200)):
        try:
            result = read(path)
        except UserError as e:
            assert one_line(e), str(e)
            came(f"damaged {kind}", "refused")
            continue
        if kind == "config.toml":
            assert result == tomllib.loads(bad.decode())
        elif kind == "text":
            assert result == bad.decode()
        else:
            assert result == reference
        came(f"damaged {kind}", "read right")


@pytest.mark.parametrize("kind", USERS)
def test_damaged_files_without_checksums(kind, stock, corpus, tmp_path, many):
    """What cannot be told from another file of its kind is used as such, and the rest refused in one line."""
    if "tokenizer.json" in kind:
        pytest.importorskip("tokenizers")
    source, name, use = USERS[kind]
    shutil.copytree(corpus if source == "corpus" else stock / source, tmp_path / "folder")
    path = tmp_path / "folder" / name
    others = [stock / folder / name for folder in ("run1", "fused0", "other", "hf1")]
    use(path)
    for _ in damage(path, [*others, stock / "run0" / "ckpt.pt"], many(12, 200)):
        try:
            use(path)
        except (UserError, PlanError) as e:
            assert one_line(e), str(e)
            came(f"damaged {kind}", "refused")
        else:
            came(f"damaged {kind}", "used")


def test_damaged_logs(interrupted, script, many):
    """A run resumes from its checkpoint whatever became of its log; whole lines are kept."""
    _, out = interrupted
    checkpoint = load_checkpoint(out / "ckpt.pt")
    raw, rng = (out / "log.jsonl").read_bytes(), random.Random(0)
    for _ in range(many(12, 200)):
        bad = damaged(rng, raw, [raw[:50], (out / "ckpt.pt").read_bytes()])
        (out / "log.jsonl").write_bytes(bad)
        run = runs.Run(out)
        run.checkpoint, run.start = checkpoint, checkpoint["step"]
        run.open_log(out / "log.jsonl")
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert all(row["step"] <= 6 for row in rows)
        kept = set(raw.splitlines()) & set(bad.split(b"\n"))
        assert kept <= {json.dumps(row).encode() for row in rows}
        came("damaged log.jsonl", "whole lines kept")


# --- hostile files ----------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['NANOKV_EXPLOITED']}",)


def test_hostile_checkpoints(stock, corpus, tmp_path, script, refused, monkeypatch):
    """Made with malice and right checksums: no code runs, memory stays, nothing is written elsewhere."""
    monkeypatch.setenv("NANOKV_EXPLOITED", str(tmp_path / "exploited"))
    good = torch.load(stock / "run0" / "ckpt.pt", weights_only=True)
    out = tmp_path / "run"
    shutil.copytree(stock / "run0", out)
    (out / "best.pt").unlink()
    huge = torch.zeros(1).expand(1 << 30, 1 << 30)
    state = good["optimizer"]
    name, moments = next((n, m) for n, m in state.items() if "momentum" in m)

    def shape(**sizes):
        return {"model_config": good["model_config"] | sizes}

    attacks = [
        {"code": Exploit()}, {"model": None}, {"model": {}}, {"config": [1]},
        {"step": "4"}, {"step": 1.5}, {"time": "x"},
        {"optimizer": {"state": {0: huge}, "param_groups": []}}, {"optimizer": {name: []}},
        {"optimizer": state | {"none": moments}},
        {"model": good["model"] | {"embed.weight": huge, "lm_head.weight": huge}},
        {"model": {k: "x" for k in good["model"]}}, {"corpus": "0" * 64},
        shape(n_layer=10**9), shape(n_embd=1 << 30), shape(vocab_size=1 << 30), shape(block_size=1 << 40),
        shape(block_size=-1), shape(head_dim=1 << 20), shape(n_hidden=1 << 30), shape(n_head=0),
        shape(plan="x"), shape(plan="keep:0"), shape(n_layer=3), shape(n_layer="2"),
        shape(rope_scaling={"factor": "x"}), shape(unknown=1), shape(plan="a\nb"),
        shape(rope_theta=True), shape(vocab_size=1 << 24),
        {"config": good["config"] | {"n_layer": 10**9}}, {"config": good["config"] | {"dataset": "\0"}},
        {"config": good["config"] | {"batch_size": 0}}, {"config": good["config"] | {"dataset": "../../x"}},
        {"config": good["config"] | {"dtype": "x"}},
    ]  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    for attack in attacks:
        torch.save(good | attack, out / "ckpt.pt")
        refused("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=4")
        came("hostile checkpoint", "refused")
        readers = [("sample.py", "--max_new_tokens=1")]
        if "config" in attack:
            readers.append(("sweep.py", "--windows=1", "--plans", "full", "--save_dir", tmp_path))
        for name, *args in readers:
            came("hostile checkpoint", outcome(script, name, "--out_dir", out, "--device=cpu", *args))
    torch.save([good], out / "ckpt.pt")
    refused("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=4")
    assert not (tmp_path / "exploited").exists()
    with zipfile.ZipFile(out / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as bomb:  # 128 MB in 128 kB
        with bomb.open("a/data.pkl", "w", force_zip64=True) as file:
            for _ in range(8):
                file.write(bytes(1 << 24))
    assert "inconsistent zip header" in refused("train.py", f"--out_dir={out}", "--init_from=resume")
    (out / "ckpt.pt").write_bytes(pickle.dumps(Exploit()))
    refused("train.py", f"--out_dir={out}", "--init_from=resume")
    assert not (tmp_path / "exploited").exists()
    else_dir = str(tmp_path / "elsewhere")
    elsewhere = {"out_dir": else_dir, "data_dir": else_dir, "dataset": "python"}
    torch.save(good | {"config": good["config"] | elsewhere}, out / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(out, tmp_path / "out" / "run")
    assert "no tokenized corpus" in refused("train.py", "--init_from=resume", "--max_iters=4")
    torch.save(good | {"config": good["config"] | {"out_dir": else_dir}}, "out/run/ckpt.pt")
    assert script("train.py", "--init_from=resume", "--max_iters=4")[0] == 0
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "out" / "run" / "log.jsonl").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < used + 300_000
    FAULTS["hostile checkpoint"].update({"refused": 4, "resumed in its own folder": 1})


NEST = "[" * 200_000


@pytest.mark.parametrize("step", ["-20000", "1.5", "true", "1e400", "[1]", "1" + "0" * 400])
def test_hostile_logs(corpus, tmp_path, script, step):
    """A line of a step that no run has; the resumed run logs the plans that it draws, and only those."""
    settings = {"router_p": 0.5, "eval_interval": 2, "max_iters": 4}
    assert script("train.py", *flags(corpus, tmp_path / "run", **settings))[0] == 0
    log = tmp_path / "run" / "log.jsonl"
    with open(log, "a") as file:
        file.write(f'{{"step": {step}, "train_loss": 1.0}}\n')
    assert script("train.py", f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=6")[0] == 0
    plans = [plan for row in record(tmp_path / "run")[0] for plan in row.get("plans", [])]
    router = StochasticRouter(2, 0.5, seed=0)
    assert plans == [router.plan(step).spec for step in range(6)]
    came("hostile log.jsonl", "resumed")


def test_curves_of_hostile_logs(tmp_path, script):
    for text in (
        NEST,
        "3",
        "[]",
        '{"train_loss": 1}',
        '{"step": 2, "val_loss": 1}',
    ):
        (tmp_path / "log.jsonl").write_text(text)
        came("hostile log.jsonl", outcome(script, "sweep.py", "--out_dir", tmp_path, "--curves"))


def test_hostile_text_files(stock, corpus, tmp_path, script, refused):
    folder = tmp_path / "data" / "own"
    shutil.copytree(corpus, folder)
    meta, train_flags = data.read_meta(folder), flags(folder, tmp_path / "run", max_iters=0)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    assert script("train.py", *train_flags)[0] == 0
    shutil.rmtree(tmp_path / "run")

    def refuse(path: Path, text: str, *args):
        path.write_text(text)
        refused(*args)
        came(f"hostile {path.suffix}", "refused")

    for text in (NEST, "[]", "{}", "3", "null", '{"tokenizer": 3}', '{"tokenizer": "bytes"}', "{{{", ""):
        refuse(folder / "meta.json", text, "train.py", *train_flags)
    one = meta["train"]
    for change in (
        {"dtype": "object"}, {"dtype": "float64"}, {"dtype": ["<u2"]}, {"vocab_size": 10**12}, {"train": [1]},
        {"vocab_size": "512"}, {"vocab_size": 0},
        {"train": one | {"bytes": -1}}, {"train": one | {"bytes": 0}}, {"train": one | {"sha256": None}},
        {"val": {}},
        {"vocab_size": 1 << 23}, {"vocab_size": True},
    ):  # fmt: skip
        refuse(folder / "meta.json", json.dumps(meta | change), "train.py", *train_flags)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < used + 300_000
    many_digits = "1" + "0" * 400
    for text in (
        NEST, f"a = {NEST}", "seed = 99999999999999999999", "seed = -1", "n_layer = true", "plan = 3",
        'out_dir = "a\\u0000b"', 'dataset = "a\\nb"', "learning_rate = inf", "learning_rate = nan",
        "beta2 = 1.0", f"n_layer = {many_digits}", f"learning_rate = {many_digits}", "[n_layer]\nx = 1",
    ):  # fmt: skip
        refuse(tmp_path / "x.toml", text, "train.py", tmp_path / "x.toml")
    out = tmp_path / "searched"
    shutil.copytree(stock / "run0", out)
    sample = ("sample.py", "--out_dir", out, "--plan", "auto:0.6", "--max_new_tokens", 2, "--device", "cpu")
    row = {"plan": "keep:0", "cache_ratio": 0.5, "calibration_loss": 1.0}
    (out / "search.jsonl").write_text(json.dumps(row))
    assert script(*sample)[0] == 0
    changes = ({"plan": "nope"}, {"calibration_loss": {}}, {"plan": 3}, {"calibration_loss": math.nan})
    for text in ("", "\n", NEST, "3", "[]", "{}", "{", *(json.dumps(row | change) for change in changes)):
        refuse(out / "search.jsonl", text, *sample)


def test_hostile_folders(stock, tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "hf"
    shutil.copytree(stock / "hf0", folder)
    hf.load_hf(folder)
    good = json.loads((folder / "config.json").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    for change in (
        {"hidden_size": 1 << 30}, {"vocab_size": 1 << 24}, {"num_hidden_layers": 10**9}, {"head_dim": True},
        {"max_position_embeddings": 1 << 40}, {"max_position_embeddings": -1}, {"hidden_size": "16"},
        {"num_attention_heads": 0}, {"rms_norm_eps": "x"}, {"rms_norm_eps": -1.0}, {"rope_parameters": [1]},
        {"rope_parameters": {"rope_theta": "x"}}, {"rope_parameters": rope | {"factor": 0}},
        {"rope_parameters": rope | {"low_freq_factor": 4.0}}, {"tie_word_embeddings": 3},
        {"head_dim": 1 << 20}, {"model_type": "mistral", "sliding_window": "x"}, {"model_type": ["llama"]},
        {"intermediate_size": 3}, {"nanokv": 3}, {"nanokv": None}, {"nanokv": {"plan": 3}},
        {"nanokv": {"plan": "nope"}}, {"nanokv": {"n_layer": 2}}, {"nanokv": {"forward_passes": -1}},
        {"nanokv": {"plan": "full"}}, {"rope_parameters": {"rope_theta": 10**400}}, {"rms_norm_eps": 10**400},
        {"rope_parameters": rope | {"factor": 10**400}}, {"model_type": "qwen2", "layer_types": 3},
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises((UserError, PlanError)) as e:
            hf.load_hf(folder)
        assert one_line(e.value)
        came("hostile folder", "refused")
    (folder / "config.json").write_text(json.dumps(good))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < used + 300_000


# --- plans and flags --------------------------------------------------------------------------------------


def random_plan(rng: random.Random) -> str:
    def number() -> str:
        return str(rng.choice([0, 1, 2, 3, 7, 8, -1, 99, 10**12, "", "x", "\uff10", "1e3", " 2"]))

    def entry() -> str:
        return rng.choice([number(), f"k{number()}v{number()}+{number()}", "kv"])

    def likely(i: int) -> str:
        return rng.choice([str(i), f"k{i}v{rng.randint(0, 7)}", f"k0v{i}+{i // 2}"])

    names = (
        "full keep cla yoco pizza-top sandwich-bottom lasagna-middle fusedkv fusedkv-lite pizza- KEEP auto"
    )
    entries = [entry() for _ in range(rng.randint(0, 9))]
    letters = [chr(rng.choice([rng.randint(0, 127), rng.randint(0, 0x10FFFF)])) for _ in range(9)]
    spec = rng.choice([
        rng.choice(names.split()) + rng.choice(["", ":"]) + rng.choice([",", "_", ":"]).join(entries),
        rng.choice(names.split()) + rng.choice(["", f":{rng.randint(0, 9)}", f":0,{rng.randint(1, 9)}"]),
        "_".join(str(rng.randint(0, 7)) for _ in range(8)),
        "_".join(map(likely, range(8))),
        "_".join(entries),
        "".join(letters[: rng.randint(0, 9)]),
    ])  # fmt: skip
    i = rng.randrange(len(spec) + 1)
    return spec[:i] + rng.choice("kv+_:,0 9\n") + spec[i + 1 :] if rng.random() < 0.2 else spec


def test_random_plans():
    rng = random.Random(0)
    for _ in range(2000):
        spec, n_layer = random_plan(rng), rng.choice([1, 2, 3, 8, 8, 8])
        try:
            plan = Plan.parse(spec, n_layer)
        except PlanError as e:
            assert one_line(e), str(e)
            came("random plan", "refused")
            continue
        assert len(plan) == n_layer and Plan.parse(plan.spec, n_layer) == plan
        assert all(0 <= j < n_layer for r in plan.routes for j in r.k + r.v) and 0 < plan.cache_ratio <= 1
        came("random plan", "a plan that parses back")


NASTY = ["", " 3", "a\nb", "9" * 20, "9" * 400, *"0 -1 1 2 nan inf 1e400 1e-320 abc 1.5 true ../../x".split()]
NASTY += "k0v 0x10 resume - = \u00fc \U0001f4a5 cla:2 full hf:x bytes".split()
TAME = {  # flag -> valid values, where 1, 2 and 4 are not
    "plan": ["full", "cla:2"], "plans": ["full", "keep:0"], "dtype": ["float32"], "device": ["cpu"],
    "init_from": ["scratch"], "dataset": ["own"], "n_embd": ["32"], "head_dim": ["0", "8"], "beta1": ["0.5"],
    "beta2": ["0.9"], "router_p": ["0.5"], "tie_embeddings": ["false"], "qk_norm": ["true"], "name": ["a"],
    "split": ["train"], "tokenizer": ["bytes"], "start": ["def"],
}  # fmt: skip


def test_random_flags(stock, corpus, tmp_path, script, many, monkeypatch):
    """Every script with random flags does its work or prints one line."""
    rng, run = random.Random(0), stock / "run0"
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 300)
    base = {
        "train.py": [f for f in flags(corpus, tmp_path / "run", max_iters=1)],
        "sample.py": ["--out_dir", run, "--max_new_tokens", "2", "--device", "cpu"],
        "sweep.py": ["--out_dir", run, "--windows", "2", "--save_dir", tmp_path / "sweep"],
        "data.py": ["--input", text, "--name", "x", "--tokenizer", "bytes"],
        "kv_router.py": ["cla:2"],
        "support/hf.py": [run, tmp_path / "hf"],
    }
    names = {
        "train.py": [f.name for f in fields(TrainConfig) if f.name != "compile"],
        "sample.py": "plan start num_samples max_new_tokens temperature top_k seed dtype device".split(),
        "sweep.py": ["plans", "windows", "batch_size", "device", "data_dir", "nope"],
        "data.py": ["dataset", "input", "name", "tokenizer", "data_dir", "split"],
        "kv_router.py": "n_layer n_head n_embd head_dim context batch bytes vocab_size".split(),
        "support/hf.py": ["nope"],
    }  # fmt: skip
    monkeypatch.setattr(data, "python_corpus", lambda: pytest.fail("no flag here asks for that"))
    for _ in range(many(60, 600)):
        name = rng.choice([*base, "train.py", "sample.py"])
        args = list(base[name])
        for flag in rng.sample(names[name], min(len(names[name]), rng.randint(1, 3))):
            value = rng.choice(NASTY if rng.random() < 0.4 else TAME.get(flag, ["1", "2", "4"]))
            args.append(f"--{flag}={value}")
        came(f"random flags of {name}", outcome(script, name, *args))
        for folder in (tmp_path / "run", tmp_path / "hf"):
            shutil.rmtree(folder, ignore_errors=True)
    assert not (tmp_path.parent / "x").exists() and not (tmp_path.parent.parent / "x").exists()


# --- smaller mistakes -------------------------------------------------------------------------------------


def test_seeds_beyond_the_generators(corpus, tmp_path, refused, stock):
    assert "--seed 18446744073709551616 is not valid" in refused(
        "train.py", *flags(corpus, tmp_path, seed=1 << 64)
    )
    sample = ("sample.py", "--out_dir", stock / "run0", "--max_new_tokens", 2)
    assert "--seed" in refused(*sample, "--seed", 1 << 64)
    FAULTS.setdefault("seed too large", Counter())["refused"] += 2


def test_fine_tuning_takes_only_the_folders_own_tokens(stock, corpus, tmp_path, script, refused):
    pytest.importorskip("safetensors")
    folder = tmp_path / "folder"
    assert script("support/hf.py", stock / "run0", folder)[0] == 0
    init = {"init_from": f"hf:{folder}", "max_iters": 1}
    given = [f for f in flags(corpus, tmp_path / "a", **init) if not re.match("--n_", f)]
    assert script("train.py", *given)[0] == 0
    given = [f for f in flags(stock / "other", tmp_path / "b", **init) if not re.match("--n_", f)]
    assert "was not tokenized with" in refused("train.py", *given)
    came("corpus of another tokenizer", "refused")


def test_cyclic_passes_come_back_from_a_folder(corpus, tmp_path, script):
    pytest.importorskip("safetensors")
    passes = {"plan": "1_1", "forward_passes": 3, "backward_passes": 1, "max_iters": 1}
    script("train.py", *flags(corpus, tmp_path / "run", **passes))
    script("support/hf.py", tmp_path / "run", tmp_path / "folder")
    c = hf.load_hf(tmp_path / "folder").config
    assert (c.plan, c.forward_passes, c.backward_passes) == ("1_1", 3, 1)
