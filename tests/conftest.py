"""What several test files share: every plan family, small models, a small corpus, running a script."""

import contextlib
import importlib
import json
import os
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import data
import train
from kv_router import Plan
from model import GPT, GPTConfig
from support import cli

import pytest
import torch

FAULTS = {}  # kind of fault -> what came of it -> how often; test_faults.py fills it
SAID = []  # lines to be read at the end
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # `datasets` would ask the network, and wait
torch.set_num_threads(1)  # tiny tensors: two threads only wait for each other
ROOT = Path(__file__).parent.parent
TINY = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "n_kv_head": 1, "block_size": 16, "batch_size": 4,
    "max_iters": 8, "warmup_iters": 2, "eval_interval": 4, "eval_iters": 1, "log_interval": 3,
    "device": "cpu", "dtype": "float32", "learning_rate": 0.01, "min_lr": 0.001,
}  # fmt: skip


def acyclic_plans(n_layer: int) -> list[str]:
    """Every acyclic family of the notation at this depth, each plan once."""
    half = n_layer // 2
    specs = ["full", "keep:0", "cla:2", "cla:3", "pizza-bottom:2", "sandwich-bottom:3", "lasagna-bottom:2"]
    specs += ["_".join(["0"] * n_layer), "_".join(["0"] + [str(i - 1) for i in range(1, n_layer)])]
    if n_layer >= 2:
        specs += ["yoco", "fusedkv", "fusedkv-lite", f"keep:0,{n_layer - 1}"]
        specs += ["0_" + "_".join(["k0+1v0+1"] * (n_layer - 1)), "0_" + "_".join(["k1v0+1"] * (n_layer - 1))]
    if n_layer >= 3:
        fan = "k" + "+".join(map(str, range(half + 1))) + "v" + "+".join(map(str, range(half + 1)))
        specs += ["_".join([*map(str, range(half + 1)), *[fan] * (n_layer - half - 1)])]
        specs += ["0_1_" + "_".join(["k1v0"] * (n_layer - 2)), "0_1_" + "_".join(["k0+1v1"] * (n_layer - 2))]
    too_deep = {1: ("cla:2", "cla:3", "pizza-bottom:2", "sandwich-bottom:3", "lasagna-bottom:2")}
    too_deep[2] = ("cla:3", "sandwich-bottom:3")
    specs = [spec for spec in specs if spec not in too_deep.get(n_layer, ())]
    return list({Plan.parse(spec, n_layer): spec for spec in reversed(specs)}.values())


def make_model(plan: str = "full", seed: int = 0, **sizes) -> GPT:
    """A small float32 model whose weights and gates are all random and large enough to matter."""
    sizes = {
        "vocab_size": 61,
        "block_size": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
    } | sizes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(plan=plan, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.5) + (p.dim() != 2))
    return model.eval()


def flags(corpus: Path, out: Path, **settings) -> list[str]:
    """The flags of a tiny run in `out`."""
    settings = TINY | {"data_dir": corpus.parent, "dataset": corpus.name, "out_dir": out} | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def new(corpus: Path, out: Path, **settings) -> list[str]:
    """The command of a tiny run."""
    return ["train.py", *flags(corpus, out, **settings)]


def resume(out: Path, **settings) -> list[str]:
    """The command of a run that goes on."""
    return [
        "train.py",
        f"--out_dir={out}",
        "--init_from=resume",
        *(f"--{k}={v}" for k, v in settings.items()),
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_log(out: Path, key: str) -> dict:
    """step -> what the log of a run has under that key"""
    return {row["step"]: row[key] for row in read_lines(out / "log.jsonl") if key in row}


@contextlib.contextmanager
def at_step(n: int | None, act):
    """Call `act` when this process comes to training step n (0 is the first)."""

    def take_step(step, *args, take_step=train.take_step):
        if step == n:
            act()
        return take_step(step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Twelve documents of made-up code, always the same, with a vocabulary of 512 tokens, in DATA_DIR/own."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz_", k=rng.randint(2, 9))) for _ in range(400)]

    def function() -> str:
        name, x, y, other = rng.choices(words, k=4)
        body = "".join(
            f"    {x} = {rng.choice(words)}({y}, {rng.randrange(100)})\n" for _ in range(rng.randrange(6))
        )
        return f"def {name}({x}, {y}):\n{body}    return {other}({x}) + {y}\n\n"

    texts = ["".join(function() for _ in range(150)) for _ in range(12)]
    folder = tmp_path_factory.mktemp("data") / "own"
    data.prepare(folder, lambda: texts, "bpe:512", "made up")
    return folder


def execute(name: str, *args):
    """What `python NAME ARGS` does, in this process. Without args, `name` is a whole command line, as a shell
    takes it. "lab/bench.py" is what `python -m lab.bench` runs."""
    if not args:
        name, *args = shlex.split(name)
    module = "support/costs.py" if name == "kv_router.py" else name
    module = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        for stream in ("stdout", "stderr"):  # which every cli.run wraps
            patch.setattr(sys, stream, getattr(sys, stream))
        cli.run(module.main)


@pytest.fixture
def script(capsys):
    """script("train.py", "--flag", ...) -> (exit status, standard output, standard error), as `execute`."""

    def call(*args) -> tuple[int, str, str]:
        status = 0
        try:
            execute(*args)
        except SystemExit as e:
            status = e.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def works(script):
    """works(script, flags ...) -> standard output, standard error, after checking that it ended well."""

    def call(*args) -> tuple[str, str]:
        status, out, err = script(*args)
        assert status == 0, err
        return out, err

    return call


@pytest.fixture
def tried(script):
    """tried(script, flags ...) -> "" where it does its work, or the one line with which it refuses, after
    checking that it is one, with exit status 2."""

    def call(name: str, *args) -> str:
        status, _, err = script(name, *args)
        if status == 0:
            return ""
        progress = r"\r?(scoring|tokenizing|learning merges) "
        lines = [line for line in err.splitlines() if not re.match(progress, line)]
        assert status == 2 and len(lines) == 1, (args, status, err)
        assert lines[0].startswith(f"{Path(name.split()[0]).name}: error: ")
        return lines[0]

    return call


@pytest.fixture
def refused(tried):
    """refused(script, flags ...) -> the one line, after checking that it does not do its work."""

    def call(*args) -> str:
        line = tried(*args)
        assert line, args
        return line

    return call


def pytest_sessionfinish(session):
    """With pytest-xdist (-n), hands what this process has gathered to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["said"] = SAID, {kind: dict(o) for kind, o in FAULTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    said, faults = getattr(node, "workeroutput", {}).get("said", ([], {}))
    SAID.extend(said)
    for kind, outcomes in faults.items():
        FAULTS.setdefault(kind, Counter()).update(outcomes)


def pytest_terminal_summary(terminalreporter):
    for line in SAID:
        terminalreporter.write_line(line)
    lines = {f"x {kind}": outcomes for kind, outcomes in FAULTS.items()}
    if FAULTS:
        lines["faults in all"] = sum(FAULTS.values(), Counter())
    for kind, outcomes in lines.items():
        told = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
        terminalreporter.write_line(f"{outcomes.total():6} {kind}: {told}")
