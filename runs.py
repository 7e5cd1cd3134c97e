"""A run's folder: checkpoints that survive crashes, a log, a lock; and loading a trained model from one.

ckpt.pt      the last saved step                best.pt      the step with the lowest held-out loss
config.json  the settings                       run.json     command, commit, versions, device
log.jsonl    losses, one JSON object a line     meta.json, tokenizer.*  copied from the corpus
"""

import errno
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import torch

import data
from cli import UserError, checked, first_line, replace_file
from kv_router import Plan
from model import GPT, GPTConfig, rope_frequencies

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

# --- loading a run ----------------------------------------------------------------------------------------

CHECKPOINT = {  # what a checkpoint holds
    "model": dict, "optimizer": dict, "step": int,
    "config": dict, "model_config": dict, "corpus": str,
    "best_val_loss": float, "time": float,
}  # fmt: skip


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, after its checksums have been verified. Nothing in it is executed: it may hold tensors
    and plain values only. UserError (one line) says what is wrong with it."""
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one: python train.py --out_dir={path.parent}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip, whose checksums torch.load ignores
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("its header lies about sizes")
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file raises errors of many kinds
        raise UserError(f"{path} cannot be read as a checkpoint ({first_line(e)})") from e
    right = isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(key), kind) for key, kind in CHECKPOINT.items()
    )
    if not right or checkpoint["step"] < 0 or not all(isinstance(key, str) for key in checkpoint["config"]):
        raise UserError(f"{path} is not a checkpoint of nanokv; train one: python train.py --out_dir=NEW")
    return checkpoint


def find_checkpoint(folder: Path, best: bool = False) -> tuple[Path, dict]:
    """The newest checkpoint of a run that can be read, or with `best` its best.pt where that can be read.
    Says so on standard error where another had to be passed over."""
    found, errors = {}, []
    for name in ("best.pt", "ckpt.pt") if best else ("ckpt.pt", "best.pt"):
        path = folder / name
        if path.exists() and not (best and found):
            try:
                found[path] = load_checkpoint(path)
            except UserError as e:
                errors.append(str(e))
    if not found:
        raise UserError(
            errors[0]
            if errors
            else f"no checkpoint in {folder}; train one: python train.py --out_dir={folder}"
        )
    path = max(found, key=lambda path: found[path]["step"])
    if not best and not errors and path.name == "best.pt":  # killed after the one and before the other
        errors = [f"{folder / 'ckpt.pt'} is missing or older"]
    for error in errors:
        print(f"{error}; taking {path} of step {found[path]['step']}", file=sys.stderr)
    return path, found[path]


def model_from(path: Path, checkpoint: dict, model_class: type[GPT] = GPT) -> GPT:
    """The model in a checkpoint that was read from `path`."""
    try:
        config = GPTConfig(**checked(checkpoint["model_config"], GPTConfig, path))
        rope_frequencies(config)  # which has settings of its own
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device="cpu")  # touches no memory yet: settings in a file could ask for any size
        model.load_state_dict(checkpoint["model"])
        if config.tie_embeddings:
            model.lm_head.weight = model.embed.weight
    except Exception as e:  # tensors and settings that do not fit each other fail in many ways
        raise UserError(f"{path} does not hold the model that its settings name ({first_line(e)})") from e
    return model


def load_run(
    out_dir: str | Path, device: str = "cpu", model_class: type[GPT] = GPT
) -> tuple[GPT, SimpleNamespace]:
    """The model of a training run, from its best checkpoint or where there is none its last, and the settings
    that it was trained with, by their names in train.TrainConfig. UserError where the folder holds no run."""
    folder = Path(out_dir)
    path, checkpoint = find_checkpoint(folder, best=True)
    if (folder / "meta.json").exists():
        trained_on = data.read_meta(folder).get("train")
        if not isinstance(trained_on, dict) or trained_on.get("sha256") != checkpoint["corpus"]:
            raise UserError(f"{folder / 'meta.json'} is not of the corpus that {path} was trained on")
    config = SimpleNamespace(**checkpoint["config"])
    if not all(isinstance(getattr(config, name, None), str) for name in ("dataset", "data_dir", "dtype")):
        raise UserError(f"{path} holds damaged settings; train anew: python train.py --out_dir=NEW")
    return model_from(path, checkpoint, model_class).to(device).eval(), config


@torch.no_grad()
def window_losses(
    model: GPT,
    tokens: data.Tokens,
    n: int,
    batch_size: int,
    plan: Plan | Callable[[int], Plan] | None = None,
    context=nullcontext,
) -> np.ndarray:
    """The mean loss of each of n held-out windows, (n,), in nats per token. `plan` may be a function of the
    batch's number; `context` makes what autocasts."""
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    rows = []
    for i, (x, y) in enumerate(tokens.held_out(n, batch_size)):
        with context():
            losses = model.losses(x.to(device), y.to(device), plan(i) if callable(plan) else plan)
        rows.append(losses.mean(dim=1).float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows)


# --- a run at work ----------------------------------------------------------------------------------------


class Run:
    """The folder of a run that is training. `start` is the step that this sitting starts from, `best` the
    lowest held-out loss so far, `logged` the last step whose training loss is in the log."""

    def __init__(
        self,
        out_dir: str | Path,
        source: Path | None = None,
        checkpoint: dict | None = None,
        writes: bool = True,
    ):
        """Nothing is written before `open`, nor ever without `writes`, as on all ranks but one. `checkpoint`,
        read from `source`, is the one to continue from."""
        self.folder, self.writes = Path(out_dir), writes
        self.resumed = checkpoint is not None
        self.start, self.best, self.earlier_seconds = 0, float("inf"), 0.0
        if checkpoint:
            self.start = checkpoint["step"]
            self.best, self.earlier_seconds = checkpoint["best_val_loss"], checkpoint["time"]
        self.last_good = (source, self.start) if checkpoint else None
        self.logged = 0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time spent, by all sittings together."""
        return self.earlier_seconds + time.monotonic() - self.began

    def open(self, settings: dict, info: dict, corpus: Path) -> None:
        """Take the folder, against other runs, and write into it what describes this one."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / "run.lock")
        if not self.resumed and any(self.folder.glob("*.pt")):
            raise UserError(f"another run has just filled {self.folder}; choose another --out_dir")
        for name in ("meta.json", "tokenizer.tiktoken", "tokenizer.json"):  # to sample without the corpus
            if (corpus / name).exists():
                replace_file(self.folder / name, (corpus / name).read_bytes())
        about = {"command": shlex.join(sys.argv), "commit": git_commit()}
        about |= {"python": platform.python_version(), "torch": torch.__version__} | info
        for name, content in (("config.json", settings), ("run.json", about)):
            replace_file(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())
        self.open_log(self.folder / "log.jsonl")

    def open_log(self, path: Path) -> None:
        """A resumed run drops the lines of steps that came after its checkpoint."""
        kept, damaged = [], 0
        old = path.read_text(encoding="utf-8", errors="replace") if self.resumed and path.exists() else ""
        for line in old.split("\n"):
            try:
                row = json.loads(line)
                if type(row["step"]) is not int or row["step"] < 0:
                    raise ValueError("no step has such a number")
                if row["step"] <= self.start:
                    kept.append(line + "\n")
                    if "train_loss" in row:
                        self.logged = row["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += bool(line)  # a killed run can leave half a line
        if damaged:
            print(f"{path}: left out {damaged} damaged line(s)")
        replace_file(path, "".join(kept).encode())
        self.log_file = open(path, "a", encoding="utf-8")

    def log(self, step: int, **row) -> None:
        if "train_loss" in row:
            self.logged = step
        if not self.writes:
            return
        try:
            self.log_file.write(json.dumps({"step": step} | row | {"time": self.seconds}) + "\n")
            self.log_file.flush()
        except OSError as e:
            self.fail(f"cannot write {self.log_file.name}: {e.strerror}", "fix that and resume")

    def save(self, step: int, state: dict, is_best: bool) -> None:
        """Write ckpt.pt and, for the best step so far, best.pt, each next to the old one and then renamed."""
        if not self.writes:
            return
        moments = (t for moment in state["optimizer"]["state"].values() for t in moment.values())
        if not all(t.isfinite().all() for t in (*state["model"].values(), *moments)):
            self.fail(f"the weights became infinite or nan by step {step}", "lower --learning_rate")
        content = io.BytesIO()
        torch.save(state | {"step": step, "best_val_loss": self.best, "time": self.seconds}, content)
        for name in ("best.pt", "ckpt.pt") if is_best else ("ckpt.pt",):  # a kill between loses no best step
            try:
                replace_file(self.folder / name, content.getbuffer())
            except OSError as e:
                what = f"cannot save step {step} to {self.folder / name}: {e.strerror}"
                self.fail(what, "fix that and resume")
            self.last_good = self.folder / name, step

    def fail(self, what: str, cure: str) -> NoReturn:
        """UserError, with the checkpoint that the run can go on from."""
        last = "no checkpoint is there"
        if self.last_good and self.last_good[0].exists():
            last = f"the last good checkpoint is {self.last_good[0]} of step {self.last_good[1]}"
        raise UserError(f"{what}; {last}; {cure}")


def lock(path: Path):
    """Open `path` and hold it against other runs until the process ends, however it ends. UserError where
    another run holds it. Some file systems have no locks (Lustre and NFS mounts, Windows' shares); there a
    second run is not noticed, which one line says."""
    file = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (OSError, ImportError) as e:
        if getattr(e, "errno", None) in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            raise UserError(f"another run is at work in {path.parent}; choose another --out_dir") from e
        print(f"{path.parent} cannot be locked ({e}): start no second run in it", file=sys.stderr)
    return file


class Signals:
    """While it is entered, the first Ctrl-C or `kill` is only noted in `received`, so that the step under way
    can be finished and saved; a second one acts at once."""

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.received = number
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step to save it; once more leaves at once\n")

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and error:
            from torch._dynamo.exc import TorchDynamoException

            if isinstance(error, TorchDynamoException):  # Ctrl-C has also stopped the C++ compiler
                raise KeyboardInterrupt from None


def git_commit() -> str | None:
    """The commit of this source, with -dirty where it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    except OSError:
        return None
