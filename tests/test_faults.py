"""Kills, full disks, damaged and hostile files: every case must end in a correct continuation or in one
clear error line. `make test` tries a few of each, `pytest -m faults` all, and both say what came of them."""

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
from conftest import FAULTS, ROOT, at_step, execute, flags, new, read_lines, read_log, resume
from torch._dynamo.exc import BackendCompilerFailed

pytestmark = pytest.mark.faults


@pytest.fixture
def many(request):
    """many(quick, full): how many cases to try in this call of pytest."""
    return lambda quick, full: full if request.config.option.markexpr == "faults" else quick


def came(kind: str, outcome: str, n: int = 1):
    FAULTS.setdefault(kind, Counter())[outcome] += n


def one_line(e: Exception) -> bool:
    return 10 < len(str(e)) and "\n" not in str(e)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def trains(corpus, works):
    """trains(folder, settings ...): a tiny run, which must end well"""
    return lambda out, **settings: works(*new(corpus, out, **settings))


@pytest.fixture
def resumes(works):
    """resumes(folder, settings ...) -> what it says, on standard output and error; it must end well"""
    return lambda out, **settings: works(*resume(out, **settings))


@pytest.fixture
def undisturbed(tmp_path, trains):
    """undisturbed(settings ...) -> the record of a run in tmp_path/whole that nothing happens to"""

    def call(**settings) -> tuple:
        trains(tmp_path / "whole", **settings)
        return record(tmp_path / "whole")

    return call


def bits(tensor) -> int:
    return hash(tensor.numpy().tobytes())


def record(out: Path) -> tuple:
    """All that a run leaves but its times: the lines of its log; step, best loss, weights and moments of its
    checkpoints."""
    rows = [row | {"time": 0, "tokens_per_s": 0} for row in read_lines(out / "log.jsonl")]
    states = {}
    for path in out.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        kept = [state[key] for key in ("step", "best_val_loss", "model", "optimizer")]
        states[path.name] = json.dumps(kept, default=bits, sort_keys=True)
    return rows, states


def drawn(rows: list[dict]) -> list[str]:
    return [plan for row in rows for plan in row.get("plans", [])]


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


# --- processes: forked from a server that has imported everything, so that a start takes no seconds -------


def hold():
    print("holding", flush=True)
    time.sleep(60)


def limit_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20),) * 2)


def _child(output: Path, command: list[str], step: int | None, act):
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with at_step(step, act):
        execute(*command)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(command) -> a running train.py, which can `act` when it comes to a step. Its said() is what it
    and those before it have said."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    context, output = multiprocessing.get_context("forkserver"), tmp_path / "output"
    context.set_forkserver_preload(["test_faults"])
    output.touch()

    def begin(command, step=None, act=None):
        process = context.Process(target=_child, args=(output, command, step, act))
        process.start()
        process.said = output.read_text
        return process

    yield begin
    for process in multiprocessing.active_children():  # where a test failed before its run had ended
        process.kill()


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_kill_9_at_any_moment_loses_nothing(corpus, out, undisturbed, start, many):
    """A run that checkpoints every step, killed and resumed until it is done, equals one never killed."""
    settings = {"router_p": 0.5, "gradient_accumulation_steps": 2, "eval_interval": 1, "max_iters": 25}
    whole, rng, kills, enough = undisturbed(**settings), random.Random(0), 0, many(2, 40)
    while kills < enough or out.exists():
        process = start(resume(out) if any(out.glob("*.pt")) else new(corpus, out, **settings))
        process.join(rng.uniform(0.05, 1.0) if kills < enough else 60)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), process.said()
        kills += process.exitcode != 0
        if process.exitcode == 0:
            assert record(out) == whole and not list(out.glob("*.tmp"))
            shutil.rmtree(out)
    came("kill -9", "resumed to the same result", kills)
    assert "Traceback" not in process.said()


def test_one_run_a_folder_and_two_signals(corpus, out, refused, undisturbed, resumes, start):
    """A second run in the folder is refused while the first is at work, and not after it was killed. The
    first of two signals is obeyed after the step, the second at once."""
    process = start(new(corpus, out, eval_interval=1), 2, hold)
    wait_for(lambda: "holding" in process.said())
    assert "another run is at work" in refused(*resume(out))
    came("two runs in one folder", "refused")
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "press again to quit immediately" in process.said())
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT
    came("two signals", "left at once")
    resumes(out, eval_interval=1)
    assert record(out) == undisturbed(eval_interval=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(corpus, out, number, start):
    process = start(new(corpus, out, max_iters=100_000, log_interval=1))
    wait_for(lambda: process.said().count("loss") > 20)
    os.kill(process.pid, number)
    process.join(30)
    said = process.said()
    assert process.exitcode == 128 + number and "Traceback" not in said, said
    step = load_checkpoint(out / "ckpt.pt")["step"]
    assert f"stopped and saved after step {step}; go on: python train.py" in said
    came(f"{number.name} to a process", "saved")


@pytest.mark.parametrize("act, raised", [(ctrl_c, KeyboardInterrupt), (lambda: None, BackendCompilerFailed)])
def test_ctrl_c_that_stops_the_compiler_too_is_no_error(act, raised):
    """A terminal sends Ctrl-C to g++ as well, and torch then says that compiling failed."""
    with pytest.raises(raised), Signals():
        act()
        raise BackendCompilerFailed("inductor", RuntimeError("g++ died"), None)


@pytest.mark.parametrize("fault", ["SIGTERM to torchrun", "kill -9 of one rank of two"])
def test_two_ranks(corpus, out, resumes, fault):
    """A polite stop saves, whichever rank heard of it first; a dead rank ends the run, without a hang."""
    output, killed = out.with_name("output"), "kill" in fault
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    command += new(corpus, out, max_iters=100_000, log_interval=1, eval_interval=20)
    with output.open("w") as f, subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f) as process:
        wait_for(lambda: output.read_text().count("  loss ") > 30)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL) if killed else process.terminate()
        process.wait(300)
    said = output.read_text()
    assert process.returncode != 0, said
    wait_for(lambda: not any(Path("/proc", rank).exists() for rank in ranks))
    step = load_checkpoint(out / "ckpt.pt")["step"]
    if not killed:
        assert 'train.py", line' not in said, said  # no traceback but torchrun's own
        assert f"stopped and saved after step {step}; go on: torchrun --standalone" in said, said
    resumes(out, max_iters=step + 2)  # on one device
    came(fault, "ended, and went on with one")


# --- runs that stop and go on, in this process ------------------------------------------------------------

RUNS = [
    {"router_p": 0.5, "gradient_accumulation_steps": 2},
    {"plan": "fusedkv", "n_layer": 4},
    {"plan": "sandwich-top:3", "n_layer": 4, "forward_passes": 2},
    # Its rate rises to the end, so that its best step is not its last.
    {"router_p": 0.5, "plan": "shared-v", "n_layer": 4, "seed": 3, "learning_rate": 2, "warmup_iters": 20},
]


@pytest.mark.parametrize("settings", RUNS)
def test_stopped_at_any_step_and_resumed(corpus, tmp_path, script, undisturbed, resumes, settings, many):
    rows, states = whole = undisturbed(**settings)
    lines = [row | {"plans": 0} for row in rows]
    for step in random.Random(str(settings)).sample(range(8), many(2, 8)):
        out = tmp_path / f"stopped{step}"
        with at_step(step, ctrl_c):
            assert script(*new(corpus, out, **settings))[0] == 130
        assert step + 1 in read_log(out, "step")  # the line that was not due yet
        resumes(out)
        again, same_states = record(out)
        assert same_states == states and drawn(again) == drawn(rows)
        lines_again = [row | {"plans": 0} for row in again]
        assert [line for line in lines_again if line in lines] == lines
        assert all(line in lines or line["step"] == step + 1 for line in lines_again)
        came("stop and resume", "the same result")
    out = tmp_path / "crashed"
    with at_step(6, sys.exit):  # as a kill does, without a last save
        script(*new(corpus, out, **settings))
    resumes(out)
    assert record(out) == whole
    came("crash and resume", "the same result")


def test_settings_that_contradict_a_checkpoint(out, trains, resumes, refused):
    trains(out, max_iters=0)
    for setting in ("n_layer=3", "plan=yoco", "seed=9", "weight_decay=0.5", "batch_size=2", "eval_iters=2"):
        line = refused(*resume(out), f"--{setting}")
        assert re.match(r".*--\w+ \S+ contradicts .*ckpt.pt, which has", line)
        came("contradiction on resume", "refused")
    text, _ = resumes(out, max_iters=8, log_interval=2, learning_rate=0.5)
    changes = {"--max_iters 8 in place of 0", "--log_interval 2 in place of 3"}
    assert changes | {"--learning_rate 0.5 in place of 0.01"} <= set(text.splitlines())
    assert [row["step"] for row in record(out)[0]] == [0, 2, 4, 4, 6, 8, 8]  # the one of step 0, too
    came("contradiction on resume", "reported")


@pytest.fixture
def interrupted(corpus, out, script, trains):
    """A run of 8 steps, whole, and the folder of another that was stopped after step 6."""
    whole = out.with_name("whole")
    trains(whole, log_interval=1)
    with at_step(5, ctrl_c):
        script(*new(corpus, out, log_interval=1))
    return whole, out


def test_the_newest_good_checkpoint_is_taken(interrupted, works, resumes, refused):
    whole, out = interrupted
    last, best, copy = out / "ckpt.pt", out / "best.pt", out.with_name("copy")
    good = last.read_bytes()
    assert load_checkpoint(best)["step"] == 4
    for bad in (b"", good[:-30], good[:4000] + bytes(200) + good[4200:], (whole / "meta.json").read_bytes()):
        last.write_bytes(bad)
        shutil.copytree(out, copy)
        text, err = resumes(copy)
        assert "resumed after step 4, from" in text and record(copy) == record(whole)
        assert re.search(r"ckpt.pt cannot be read .*; falling back to \S*best.pt of step 4", err)
        shutil.rmtree(copy)
        came("damaged ckpt.pt", "best.pt taken")
    last.write_bytes(good)
    shutil.copytree(out, copy)
    shutil.copy(whole / "best.pt", copy)  # killed between the two: best.pt is newer
    step = load_checkpoint(copy / "best.pt")["step"]
    assert f"all {step} steps are done" in resumes(copy, max_iters=step)[0]
    assert load_checkpoint(copy / "ckpt.pt")["step"] == step
    shutil.copy(last, copy)
    text, err = resumes(copy, max_iters=9)
    assert "resumed after step 8, from" in text and "ckpt.pt is missing or older" in err
    came("older ckpt.pt", "best.pt taken")
    last.unlink()
    assert "holds a run" in refused(*new(out, out))
    best.rename(last)
    best.write_bytes(good[:-30])
    _, err = works(f"sample.py --out_dir {out} --max_new_tokens 4 --device cpu")
    assert re.search(r"best.pt cannot be read .*; falling back to \S*ckpt.pt of step 4", err)
    came("damaged best.pt", "ckpt.pt taken")
    last.write_bytes(good[:-30])
    assert "cannot be read" in refused(*resume(out))
    came("both damaged", "refused")


def test_a_full_disk(corpus, out, undisturbed, resumes, refused):
    """No file may grow beyond a limit from step 5 on: the save fails, and the one before it is whole."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        with at_step(5, lambda: limit(10_000)):
            line = refused(*new(corpus, out))
    finally:
        limit(soft)
    assert re.search(r"cannot save step 8 to .*: File too large; .*/ckpt.pt of step 4;", line)
    assert not list(out.glob("*.tmp"))
    assert [load_checkpoint(out / name)["step"] for name in ("ckpt.pt", "best.pt")] == [4, 4]
    resumes(out)
    assert record(out) == undisturbed()
    came("full disk", "refused, then the same result")


def test_a_full_tmpfs(corpus, tmp_path, undisturbed, resumes, refused, many):
    """A real full disk, where the machine lets us mount one."""
    disk, out = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    settings = {"n_embd": 64, "eval_interval": 1, "log_interval": 1}
    whole = undisturbed(**settings)
    size = (tmp_path / "whole" / "ckpt.pt").stat().st_size

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not many(0, 1) or not mount(f"size={int(2.5 * size)}"):
        pytest.skip("only with -m faults, and only where tmpfs can be mounted")
    try:
        line = refused(*new(corpus, out, **settings))
        assert "No space left on device; the last good checkpoint is" in line
        came("full tmpfs", "refused")
        assert mount(f"remount,size={10 * size}")
        resumes(out)
        assert record(out) == whole
        assert mount("remount,ro")
        for command in (new(corpus, disk / "other"), resume(out, max_iters=9)):
            assert "Read-only file system" in refused(*command)
            came("read-only folder", "refused")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_vanishes_or_cannot_be_written(corpus, out, trains, refused):
    victim = out.with_name("victim")
    with at_step(5, lambda: shutil.rmtree(out)):
        line = refused(*new(corpus, out))
    assert "was removed, or is another run's now; no checkpoint is there" in line
    for folder in ("/proc/nanokv", "/proc/self", "/dev/null/x"):
        assert folder in refused(*new(corpus, folder))
        came("no output folder", "refused")
    victim.write_text("precious")
    out.mkdir()
    names = "run.json log.jsonl config.json meta.json ckpt.pt.tmp run.lock".split()
    for name in names:
        (out / name).symlink_to(victim)  # a folder from elsewhere can hold links
    trains(out)
    assert victim.read_text() == "precious"
    assert [name for name in names if (out / name).is_symlink()] in ([], ["run.lock"])  # which has no content
    assert record(out)[1]
    came("link out of the folder", "replaced")


@pytest.mark.parametrize("what", ["loss", "gradient norm", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_gone_bad(corpus, out, undisturbed, resumes, refused, what, value):
    """Named with its step and plan; the checkpoint before it stays, and leads to the undamaged result."""
    settings = {"router_p": 0.5, "gradient_accumulation_steps": 2, "log_interval": 4}
    _, states = undisturbed(**settings)

    def spoiled(step, c, model, *rest, take_step=train.take_step):
        if step == 5 and what == "loss":
            model.register_forward_hook(lambda model, given, result: (result[0], result[1] * value))
        if step == 5 and what == "gradient norm":
            model.embed.weight.register_hook(lambda gradient: torch.full_like(gradient, value))
        losses = take_step(step, c, model, *rest)
        if step == 5 and what == "weights":
            model.embed.weight.data[0] = value
            ctrl_c()  # saves before a loss can show it
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "take_step", spoiled)
        line = refused(*new(corpus, out, **settings))
    plans = ", ".join(StochasticRouter(2, 0.5, 0).plan(i).spec for i in (10, 11))
    wanted = {"weights": "the weights became infinite or nan by step 6;"}
    assert wanted.get(what, f"the {what} became {value} by step 6; plan: {plans};") in line
    assert f"the last good checkpoint is {out / 'ckpt.pt'} of step 4; lower --learning_rate" in line
    resumes(out)
    assert record(out)[1] == states
    came(f"{what} gone bad", "named, then the same result")


def test_a_clock_that_jumps(out, trains, monkeypatch):
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.choice([-1e6, -10, 0, 10, 1e6]))
    trains(out)
    rows = read_lines(out / "log.jsonl")
    times = [row["time"] for row in rows]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 100
    assert all(0 < row["tokens_per_s"] < 1e7 for row in rows if "tokens_per_s" in row)
    came("clock that jumps", "right rates")


def test_a_coarse_clock(out, trains, monkeypatch):
    """A step can take less time than the clock resolves: on Windows, 16 milliseconds."""
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() // 0.5 * 0.5)
    trains(out, log_interval=1)
    came("coarse clock", "trained")


@pytest.mark.parametrize("plan", ["full", "fusedkv", "1_1"])
def test_a_context_of_one_token(out, trains, works, refused, plan):
    trains(out, block_size=1, plan=plan)
    assert all(map(math.isfinite, read_log(out, "val_loss").values()))
    works(f"sweep.py --out_dir {out} --windows 4 --device cpu")
    assert "do not fit the context of 1" in refused(f"sample.py --out_dir {out} --max_new_tokens 1")
    came("context of one token", "trained, swept, not sampled")


def test_a_corpus_of_one_batch(out, works):
    one = out.with_name("one")
    data.prepare(one, lambda: ["abcdefghij\n" * 60], "bytes", "a test")
    n = data.Tokens(one, "val", 1).n_tokens - 1
    batch_size = data.Tokens(one, "train", n).n_windows
    works(*new(one, out, block_size=n, batch_size=batch_size))
    first, *_, last = read_log(out, "val_loss").values()
    assert last < first
    came("corpus of one batch", "trained")


def test_out_of_memory_is_one_line(corpus, out, start, refused):
    process = start(new(corpus, out, batch_size=100_000), 0, limit_memory)
    process.join(60)
    said = process.said()
    assert process.exitcode == 2 and "Traceback" not in said, said
    assert re.search("out of memory .*lower --batch_size.*\n$", said), said
    line = refused(*new(corpus, out, n_embd=200_000))
    assert re.search("parameters need .* to train and cpu has .*; lower --n_layer or --n_embd", line)
    came("out of memory", "refused", 2)


# --- damaged files ----------------------------------------------------------------------------------------


def damaged(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """`raw` cut short, with bits flipped, overwritten, repeated or lost in places, or another file."""
    i, n = rng.randrange(len(raw)), rng.choice([1, 8, 64, len(raw) // 4])
    before, lost, after = raw[:i], raw[i : i + n], raw[i + n :]
    flipped = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 3])):
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    new = rng.choice([bytes(len(lost)), rng.randbytes(len(lost)), b"", 2 * lost])
    longer = raw + rng.choice([bytes(n), rng.randbytes(n), raw])
    kinds = [before, bytes(flipped), before + new + after, longer, rng.choice(others)]
    return rng.choices(kinds, [1, 3, 4, 1, 1])[0]


@pytest.fixture(scope="module")
def stock(corpus, tmp_path_factory):
    """Two runs and two corpora that differ only in a seed or a text, a folder of each run, found plans."""
    folder = tmp_path_factory.mktemp("stock")
    data.prepare(folder / "other", other_texts, "bpe:512", "other text")
    for seed, of in enumerate((corpus, folder / "other")):
        run, fused = folder / f"run{seed}", folder / "fused" / str(seed)
        for out, plan in ((run, "full"), (fused, "0_k0+1v0")):
            execute(*new(of, out, seed=seed, plan=plan, max_iters=2))
        execute(f"sweep.py --out_dir {run} --search --windows 8 --device cpu")
        execute(f"support/hf.py {fused} {folder}/hf{seed}")
    return folder


def other_texts() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))]


@pytest.fixture(scope="module")
def json_corpus(tmp_path_factory):
    """A corpus with a Hugging Face tokenizer."""
    folder = tmp_path_factory.mktemp("json")
    made = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    made.train_from_iterator(other_texts(), vocab_size=400, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    data.prepare(folder / "corpus", other_texts, str(folder / "tokenizer.json"), "other text")
    return folder / "corpus"


# What reads a file: it returns what must be the same whenever the file can be read or, where nothing tells a
# file from another of its kind, uses it and returns nothing.


def read_split(path: Path) -> tuple:
    tokens = data.Tokens(path.parent, path.stem, 16)
    return path.read_bytes(), tokens.bytes_per_token, tokens.meta


def read_checkpoint(path: Path) -> tuple:
    for other in {*path.parent.glob("*.pt")} - {path}:  # nothing stands in for it
        other.unlink()
    model, config = load_run(path.parent)
    return config, {name: bits(t) for name, t in model.state_dict().items()}


def read_settings(path: Path) -> bool:
    return cli.read_toml(path, TrainConfig) == tomllib.loads(path.read_bytes().decode())


def read_text(path: Path) -> bool:
    return data.read_text(path) == path.read_bytes().decode()


def use_tokenizer(path: Path):
    enc = data.load_tokenizer(path.parent)
    ids = enc.encode_ordinary("def main(): return 1")
    assert all(0 <= i < enc.n_vocab for i in ids)
    enc.decode(ids)


def use_corpus(path: Path):
    for split in data.SPLITS:
        tokens = data.Tokens(path.parent, split, 16)
        tokens.batch(0, 4, seed=0)
        assert math.isfinite(tokens.bits_per_byte(1.0))
    use_tokenizer(path)


def use_model(model: GPT):
    tokens = torch.arange(8).view(1, 8) % model.config.vocab_size
    model.losses(tokens, tokens)


def use_run(path: Path):
    use_model(load_run(path.parent)[0])
    use_tokenizer(path)


def use_search(path: Path):
    model = load_run(path.parent)[0]
    model.resolve(sweep.auto_plan("auto:0.6", str(path.parent), model))


def use_folder(path: Path):
    use_model(hf.load_hf(path.parent))


READERS = [  # folder in stock or fixture, file, what reads it
    ("run0", "ckpt.pt", read_checkpoint),
    ("run0", "best.pt", read_checkpoint),
    ("corpus", "train.bin", read_split),
    ("corpus", "val.bin", read_split),
    ("run0", "config.toml", read_settings),
    ("run0", "text", read_text),
    ("corpus", "meta.json", use_corpus),
    ("run0", "meta.json", use_run),
    ("corpus", "tokenizer.tiktoken", use_tokenizer),
    ("json_corpus", "tokenizer.json", use_tokenizer),
    ("run0", "search.jsonl", use_search),
    ("hf0", "config.json", use_folder),
    ("hf0", "model.safetensors", use_folder),
]


@pytest.mark.parametrize("source, name, read", READERS)
def test_damaged_files(source, name, read, stock, request, tmp_path, many):
    """Each is read right, or refused in one line, never read wrong. What cannot be told from another file of
    its kind is used as such."""
    folder = stock / source if (stock / source).exists() else request.getfixturevalue(source)
    path = shutil.copytree(folder, tmp_path / "folder") / name
    if not path.exists():
        path.write_text('# größe\nn_layer = 4\nlearning_rate = 0.003\nplan = "keep:0,2"\nqk_norm = true\n')
    right, raw, rng = read(path), path.read_bytes(), random.Random(source + name)
    names = (name, "search.jsonl", "model.safetensors", "ckpt.pt")
    others = [other.read_bytes() for name in names for other in sorted(stock.glob(f"*/{name}"))]
    for _ in range(many(14, 400)):
        path.write_bytes(damaged(rng, raw, others))
        try:
            assert read(path) == right
            came(f"damaged {name}", "read right" if right else "used")
        except (UserError, PlanError) as e:
            assert one_line(e) and (right is None or isinstance(e, UserError)), str(e)
            came(f"damaged {name}", "refused")


def test_damaged_logs(interrupted, many):
    """A run resumes from its checkpoint whatever became of its log; whole lines are kept."""
    _, out = interrupted
    log, rng = out / "log.jsonl", random.Random(0)
    raw, others = log.read_bytes(), [(out / "ckpt.pt").read_bytes()]
    for _ in range(many(12, 300)):
        bad = damaged(rng, raw, others)
        log.write_bytes(bad)
        run = runs.Run(out)
        run.checkpoint = run.start = 6
        run.open_log(log)
        assert all(row["step"] <= 6 for row in read_lines(log))
        assert set(raw.splitlines()) & set(bad.split(b"\n")) <= set(log.read_bytes().splitlines())
        came("damaged log.jsonl", "whole lines kept")


# --- hostile files ----------------------------------------------------------------------------------------


def changed(good: dict, changes: dict[str, list]) -> list[dict]:
    """`good` with one value changed at a time."""
    return [good | {key: value} for key, values in changes.items() for value in values]


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB


@pytest.fixture
def in_little_memory(stock):
    used = peak_memory()
    yield
    assert peak_memory() < used + 300_000


class Exploit:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['NANOKV_EXPLOITED']}",)


@pytest.fixture
def hostile(stock, tmp_path, monkeypatch, in_little_memory):
    """A run's folder with a single checkpoint, and what is in that; no code may run that is put into it."""
    monkeypatch.setenv("NANOKV_EXPLOITED", str(tmp_path / "exploited"))
    out = shutil.copytree(stock / "run0", tmp_path / "run")
    (out / "best.pt").unlink()
    yield out, torch.load(out / "ckpt.pt", weights_only=True)
    assert not (tmp_path / "exploited").exists()


def test_hostile_checkpoints(hostile, tmp_path, tried, refused):
    """Made with malice and right checksums: no code runs, memory stays."""
    out, good = hostile
    huge = torch.zeros(1).expand(1 << 30, 1 << 30)
    moments = good["optimizer"]
    name = next(name for name in moments if "momentum" in moments[name])
    sizes = {
        "n_layer": [10**9, 3, "2"], "n_embd": [1 << 30], "vocab_size": [1 << 30, 1 << 24], "n_head": [0],
        "block_size": [1 << 40, -1], "head_dim": [1 << 20], "n_hidden": [1 << 30], "rope_theta": [True],
        "plan": ["x", "keep:0", "a\nb"], "rope_scaling": [{"factor": "x"}], "unknown": [1],
    }  # fmt: skip
    settings = {"n_layer": [10**9], "dataset": ["\0", "../../x"], "batch_size": [0], "dtype": ["x"]}
    optimizers = [{"state": {0: huge}, "param_groups": []}, {name: []}, moments | {"none": moments[name]}]
    large = good["model"] | {"embed.weight": huge, "lm_head.weight": huge}
    attacks = {
        "code": [Exploit()], "step": ["4", 1.5], "time": ["x"], "corpus": ["0" * 64], "optimizer": optimizers,
        "model": [None, {}, large, dict.fromkeys(good["model"], "x")],
        "model_config": changed(good["model_config"], sizes),
        "config": [[1], *changed(good["config"], settings)],
    }  # fmt: skip
    sample = f"sample.py --out_dir {out} --max_new_tokens 1 --device cpu"
    sweep_one = f"sweep.py --out_dir {out} --windows 1 --plans full --save_dir {tmp_path} --device cpu"
    for bad in changed(good, attacks):
        torch.save(bad, out / "ckpt.pt")
        refused(*resume(out, max_iters=4))
        came("hostile checkpoint", "refused")
        for command in [sample, sweep_one] if bad["config"] != good["config"] else [sample]:
            came("hostile checkpoint", "refused" if tried(command) else "work")


def test_checkpoints_that_are_none(hostile, refused):
    out, good = hostile
    torch.save([good], out / "ckpt.pt")
    refused(*resume(out, max_iters=4))
    with zipfile.ZipFile(out / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as bomb:  # 128 MB in 128 kB
        bomb.writestr("a/data.pkl", bytes(1 << 27))
    assert "inconsistent zip header" in refused(*resume(out))
    (out / "ckpt.pt").write_bytes(pickle.dumps(Exploit()))
    refused(*resume(out))
    came("hostile checkpoint", "refused", 3)


def test_a_checkpoint_that_points_elsewhere(hostile, tmp_path, works, refused, monkeypatch):
    """Nothing is written but in the run's own folder."""
    out, good = hostile
    elsewhere = str(tmp_path / "elsewhere")
    away = {"out_dir": elsewhere, "data_dir": elsewhere, "dataset": "python"}
    monkeypatch.chdir(tmp_path)
    shutil.move(out, tmp_path / "out" / "run")
    command = "train.py --init_from=resume --max_iters=4"
    torch.save(good | {"config": good["config"] | away}, "out/run/ckpt.pt")
    assert "no tokenized corpus" in refused(command)
    torch.save(good | {"config": good["config"] | {"out_dir": elsewhere}}, "out/run/ckpt.pt")
    works(command)
    assert not (tmp_path / "elsewhere").exists() and Path("out/run/log.jsonl").exists()
    came("hostile checkpoint", "refused")
    came("hostile checkpoint", "resumed in its own folder")


NEST = "[" * 200_000
DIGITS = "1" + "0" * 400


@pytest.mark.parametrize("step", ["-20000", "1.5", "true", "1e400", "[1]", DIGITS])
def test_hostile_logs(out, trains, resumes, step):
    """A line of a step that no run has; the resumed run logs the plans that it draws, and only those."""
    trains(out, router_p=0.5, eval_interval=2, max_iters=4)
    with open(out / "log.jsonl", "a") as file:
        file.write(f'{{"step": {step}, "train_loss": 1.0}}\n')
    resumes(out, max_iters=6)
    router = StochasticRouter(2, 0.5, seed=0)
    assert drawn(record(out)[0]) == [router.plan(step).spec for step in range(6)]
    came("hostile log.jsonl", "resumed")


@pytest.mark.parametrize("text", [NEST, "3", "[]", '{"train_loss": 1}', '{"step": 2, "val_loss": 1}'])
def test_curves_of_hostile_logs(tmp_path, tried, text):
    (tmp_path / "log.jsonl").write_text(text)
    line = tried(f"sweep.py --out_dir {tmp_path} --curves")
    came("hostile log.jsonl", "refused" if line else "work")


@pytest.fixture
def refuses(refused, in_little_memory):
    """refuses(file, texts or objects, script, flags ...): each in the file is refused"""

    def check(path: Path, texts: list, *command):
        for text in texts:
            path.write_text(text if isinstance(text, str) else json.dumps(text))
            refused(*command)
        came(f"hostile {path.name}", "refused", len(texts))

    return check


def test_hostile_meta_json(corpus, tmp_path, works, refuses):
    mine = shutil.copytree(corpus, tmp_path / "data" / "own")
    meta, command = data.read_meta(mine), new(mine, tmp_path / "run", max_iters=0)
    works(*command)
    shutil.rmtree(tmp_path / "run")
    texts = [NEST, "[]", "{}", "3", "null", '{"tokenizer": 3}', '{"tokenizer": "bytes"}', "{{{", ""]
    one = meta["train"]
    changes = {
        "dtype": ["object", "float64", ["<u2"]], "vocab_size": [10**12, "512", 0, 1 << 23, True], "val": [{}],
        "train": [[1], *changed(one, {"bytes": [-1, 0], "sha256": [None]})],
    }  # fmt: skip
    texts += changed(meta, changes)
    refuses(mine / "meta.json", texts, *command)


def test_hostile_settings(tmp_path, refuses):
    texts = [
        NEST, f"a = {NEST}", "seed = 99999999999999999999", "seed = -1", "n_layer = true", "plan = 3",
        'out_dir = "a\\u0000b"', 'dataset = "a\\nb"', "learning_rate = inf", "learning_rate = nan",
        "beta2 = 1.0", f"n_layer = {DIGITS}", f"learning_rate = {DIGITS}", "[n_layer]\nx = 1",
    ]  # fmt: skip
    refuses(tmp_path / "x.toml", texts, f"train.py {tmp_path}/x.toml")


def test_hostile_search(stock, tmp_path, works, refuses):
    out = shutil.copytree(stock / "run0", tmp_path / "run")
    sample = f"sample.py --out_dir {out} --plan auto:0.6 --max_new_tokens 2 --device cpu"
    row = {"plan": "keep:0", "cache_ratio": 0.5, "calibration_loss": 1.0}
    (out / "search.jsonl").write_text(json.dumps(row))
    works(sample)
    changes = {"plan": ["nope", 3], "calibration_loss": [{}, math.nan]}
    texts = ["", "\n", NEST, "3", "[]", "{}", "{", *changed(row, changes)]
    refuses(out / "search.jsonl", texts, sample)


def test_hostile_folders(stock, tmp_path, in_little_memory):
    folder = shutil.copytree(stock / "hf0", tmp_path / "hf")
    hf.load_hf(folder)
    good = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    ropes = changed(rope, {"factor": [0, 10**400], "low_freq_factor": [4.0]})
    plans = [{"plan": 3}, {"plan": "nope"}, {"plan": "full"}, {"n_layer": 2}, {"forward_passes": -1}]
    changes = {
        "hidden_size": [1 << 30, "16"], "vocab_size": [1 << 24], "num_hidden_layers": [10**9],
        "head_dim": [True, 1 << 20], "max_position_embeddings": [1 << 40, -1], "num_attention_heads": [0],
        "intermediate_size": [3], "rms_norm_eps": ["x", -1.0, 10**400], "tie_word_embeddings": [3],
        "rope_parameters": [[1], {"rope_theta": "x"}, {"rope_theta": 10**400}, *ropes],
        "model_type": [["llama"]], "nanokv": [3, None, *plans],
    }  # fmt: skip
    mistral, qwen2 = good | {"model_type": "mistral"}, good | {"model_type": "qwen2"}
    others = [mistral | {"sliding_window": "x"}, qwen2 | {"layer_types": 3}]
    for config in changed(good, changes) + others:
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises((UserError, PlanError)) as e:
            hf.load_hf(folder)
        assert one_line(e.value)
        came("hostile folder", "refused")


# --- plans and flags --------------------------------------------------------------------------------------


NAMES = "full keep cla yoco pizza-top sandwich-bottom lasagna-middle fusedkv fusedkv-lite pizza- KEEP auto"
NUMBERS = ["", " 2", *"0 1 2 3 7 8 -1 99 1000000000000 x \uff10 1e3".split()]


def random_plan(rng: random.Random) -> str:
    name, few = rng.choice(NAMES.split()), rng.randrange(10)
    entries, likely = [], []
    for i in range(8):
        a, b, c = rng.choices(NUMBERS, k=3)
        entries.append(rng.choice([a, f"k{a}v{b}+{c}", "kv"]))
        likely.append(rng.choice([str(i), f"k{i}v{rng.randint(0, 7)}", f"k0v{i}+{i // 2}"]))
    letters = rng.choices(range(128), k=few) + rng.choices(range(0x110000), k=few)
    some = entries[:few]
    spec = rng.choice([
        name + rng.choice(["", ":"]) + rng.choice(",_:").join(some),
        name + rng.choice(["", f":{few}", f":0,{few}"]),
        "_".join(rng.choices("01234567", k=8)),
        "_".join(likely),
        "_".join(some),
        "".join(map(chr, rng.sample(letters, few))),
    ])  # fmt: skip
    i = rng.randrange(len(spec) + 1)
    return spec[:i] + rng.choice("kv+_:,0 9\n") + spec[i + 1 :] if rng.random() < 0.2 else spec


def test_random_plans(many):
    rng = random.Random(0)
    for _ in range(many(2000, 10_000)):
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
    "plan": "full cla:2", "plans": "full keep:0", "dtype": "float32", "device": "cpu", "init_from": "scratch",
    "dataset": "own", "n_embd": "32", "head_dim": "0 8", "beta1": "0.5", "beta2": "0.9", "router_p": "0.5",
    "tie_embeddings": "false", "qk_norm": "true", "name": "a", "split": "train", "tokenizer": "bytes",
    "start": "def",
}  # fmt: skip
FLAGS = {
    "train.py": " ".join(f.name for f in fields(TrainConfig) if f.name != "compile"),
    "sample.py": "plan start num_samples max_new_tokens temperature top_k seed dtype device",
    "sweep.py": "plans windows batch_size device data_dir nope",
    "data.py": "dataset input name tokenizer data_dir split",
    "kv_router.py": "n_layer n_head n_embd head_dim context batch bytes vocab_size",
    "support/hf.py": "nope",
}


def test_random_flags(stock, corpus, tmp_path, tried, many, monkeypatch):
    """Every script with random flags does its work or prints one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "python_corpus", lambda: pytest.fail("no flag here asks for that"))
    Path("text.txt").write_text("some text\n" * 300)
    base = {
        "train.py": " ".join(flags(corpus, "run", max_iters=1)),
        "sample.py": f"--out_dir {stock}/run0 --max_new_tokens 2 --device cpu",
        "sweep.py": f"--out_dir {stock}/run0 --windows 2 --save_dir sweep",
        "data.py": "--input text.txt --name x --tokenizer bytes",
        "kv_router.py": "cla:2",
        "support/hf.py": f"{stock}/run0 hf",
    }
    rng = random.Random(0)
    for _ in range(many(60, 600)):
        name = rng.choice([*base, "train.py", "sample.py"])
        names, args = FLAGS[name].split(), base[name].split()
        for flag in rng.sample(names, min(len(names), rng.randint(1, 3))):
            value = rng.choice(NASTY if rng.random() < 0.4 else TAME.get(flag, "1 2 4").split())
            args.append(f"--{flag}={value}")
        came(f"random flags of {name}", "refused" if tried(name, *args) else "work")
        for folder in ("run", "hf"):
            shutil.rmtree(folder, ignore_errors=True)
    assert not any((folder / "x").exists() for folder in tmp_path.parents[:2])


# --- smaller mistakes -------------------------------------------------------------------------------------


def test_seeds_beyond_the_generators(corpus, out, refused, stock):
    assert "--seed 18446744073709551616 is not valid" in refused(*new(corpus, out, seed=1 << 64))
    assert "--seed" in refused(f"sample.py --out_dir {stock}/run0 --max_new_tokens 2 --seed {1 << 64}")
    came("seed too large", "refused", 2)


def test_fine_tuning_takes_only_the_folders_own_tokens(stock, corpus, tmp_path, works, refused):
    folder = tmp_path / "folder"
    works(f"support/hf.py {stock}/run0 {folder}")

    def tune(corpus: Path) -> list[str]:
        command = new(corpus, tmp_path / "run", init_from=f"hf:{folder}", max_iters=1)
        return [word for word in command if not word.startswith("--n_")]

    assert "was not tokenized with" in refused(*tune(stock / "other"))
    works(*tune(corpus))
    came("corpus of another tokenizer", "refused")


def test_cyclic_passes_come_back_from_a_folder(out, trains, works):
    pytest.importorskip("safetensors")
    folder = out.with_name("folder")
    trains(out, plan="1_1", forward_passes=3, backward_passes=1, max_iters=1)
    works(f"support/hf.py {out} {folder}")
    c = hf.load_hf(folder).config
    assert (c.plan, c.forward_passes, c.backward_passes) == ("1_1", 3, 1)
