"""A run's folder: checkpoints that survive crashes, a log, a lock; and loading a trained model from one.

ckpt.pt      the last saved step                best.pt      the step with the lowest held-out loss
config.json  the settings                       run.json     command, commit, versions, device
log.jsonl    losses, one JSON object a line     meta.json, tokenizer.*  copied from the corpus
"""

import io
import json
import math
import operator
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import data
from kv_router import Plan
from model import GPT, GPTConfig, rope_frequencies
from support import parallel
from support.cli import (
    Pace,
    UserError,
    checked,
    duration,
    ending_signals,
    first_line,
    lock,
    out_of_memory,
    quote,
    replace_file,
)

import numpy as np
import torch

# --- loading a run ----------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, after its checksums have been verified. Nothing in it is executed: it may hold tensors
    and plain values only. UserError (one line) says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip, whose checksums torch.load ignores
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("inconsistent zip header")
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for settings in (checkpoint["config"], checkpoint["model_config"]):
            drop_retired(settings, path)
        # Errors here too, and not later, where these are no numbers.
        operator.index(checkpoint["step"]), float(checkpoint["time"]), float(checkpoint["best_val_loss"])
        return checkpoint
    except (UserError, PermissionError):
        raise
    except Exception as e:  # a damaged file raises errors of many kinds
        if out_of_memory(e):
            raise MemoryError(f"while reading {path}, which is not damaged") from e
        raise UserError(f"{path} cannot be read as a checkpoint of nanokv ({first_line(e)})") from e


def drop_retired(settings: dict, where: object) -> None:
    """Take out what earlier versions wrote and this one does not have. UserError where it mattered."""
    if settings.pop("key_residual", False):
        raise UserError(f"{where} has key_residual, which this version does not have; train a new model")
    settings.pop("sample_interval", None)


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
        fix = f"train one: python train.py --out_dir={quote(folder)}"
        if runs := sorted(path.parent.name for path in folder.glob("*/ckpt.pt")):
            fix = f"its runs are {', '.join(runs)}"
        raise UserError(errors[0] if errors else f"no checkpoint in {folder}; {fix}")
    # By step, not by name: a run that was killed between its two files leaves the newer one as best.pt.
    path = max(found, key=lambda path: found[path]["step"])
    if not best and not errors and path.name == "best.pt":  # killed after the one and before the other
        errors = [f"{folder / 'ckpt.pt'} is missing or older"]
    for error in errors:
        print(f"{error}; falling back to {path} of step {found[path]['step']}", file=sys.stderr)
    return path, found[path]


def model_from(path: Path, checkpoint: dict) -> GPT:
    """The model in a checkpoint that was read from `path`."""
    try:
        config = GPTConfig(**checked(checkpoint["model_config"], GPTConfig, path))
        rope_frequencies(config)  # which has settings of its own
        with torch.device("meta"):
            model = GPT(config)
        model.to_empty(device="cpu")  # touches no memory yet: settings in a file could ask for any size
        model.load_state_dict(checkpoint["model"])
        if config.tie_embeddings:
            model.lm_head.weight = model.embed.weight
    except Exception as e:  # tensors and settings that do not fit each other fail in many ways
        if out_of_memory(e):
            raise
        raise UserError(f"{path} does not hold the model that its settings name ({first_line(e)})") from e
    return model


def load_run(out_dir: str | Path, device: str = "cpu") -> tuple[GPT, SimpleNamespace]:
    """The model of a training run, from its best checkpoint or where there is none its last, and the settings
    that it was trained with, by their names in train.TrainConfig, and its `step`. UserError where the folder
    holds no run."""
    folder = Path(out_dir)
    path, checkpoint = find_checkpoint(folder, best=True)
    if (folder / "meta.json").exists():
        if data.read_meta(folder)["train"]["sha256"] != checkpoint["corpus"]:
            raise UserError(f"{folder / 'meta.json'} is not of the corpus that {path} was trained on")
    config = SimpleNamespace(**checkpoint["config"], step=checkpoint["step"])
    return model_from(path, checkpoint).to(device).eval(), config


def fingerprint(model: GPT) -> str:
    """A checksum of the weights, which tells whether a result is of these."""
    crc = 0
    for p in model.state_dict().values():
        crc = zlib.crc32(p.cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


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
    """The folder of a run that trains. `start` is this process's first step, `best` the lowest held-out loss
    so far, `saved` the last step that is in a checkpoint, and `checkpoint` the one that the run goes on from,
    read from `source`. Only one rank `writes`."""

    def __init__(self, out_dir: str | Path, writes: bool = True):
        self.folder, self.writes = Path(out_dir), writes
        self.source: Path | None = None
        self.checkpoint: dict | None = None
        self.start, self.best, self.seconds_before = 0, math.inf, 0.0
        self.saved = self.evaluated = None  # evaluated: a step that an earlier process has evaluated
        self.lock, self.log_file = None, None
        self.began, self.pace = time.monotonic(), Pace()

    @property
    def seconds(self) -> float:
        """The time spent, by this process and those before it."""
        return self.seconds_before + time.monotonic() - self.began

    # --- starting ---

    def resume(self) -> dict:
        """Take the folder and then read its newest checkpoint, which another run may have been writing."""
        if self.has_checkpoint():
            self.take_folder()
        self.source, self.checkpoint = find_checkpoint(self.folder)
        self.start = self.saved = self.evaluated = self.checkpoint["step"]
        self.best, self.seconds_before = self.checkpoint["best_val_loss"], self.checkpoint["time"]
        if self.source.name == "best.pt" and self.writes:  # ckpt.pt is missing, older or damaged
            replace_file(self.folder / "ckpt.pt", self.source.read_bytes())
        self.pace = Pace(self.start)
        return self.checkpoint

    def take_folder(self) -> None:
        """Hold the folder against other runs, and clear away what a killed one has left. UserError where it
        is held."""
        if self.writes and self.lock is None:
            self.lock = lock(self.folder / "run.lock")
            for left in self.folder.glob("*.tmp"):  # by a run that was killed while it saved
                left.unlink()

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from, damaged or not."""
        return any((self.folder / name).exists() for name in ("ckpt.pt", "best.pt"))

    def refuse_used_folder(self) -> None:
        """UserError where a new run cannot start in the folder, since it holds another or is no run's."""
        if self.has_checkpoint():
            raise UserError(
                f"{self.folder} holds a run; continue it: --init_from=resume, or choose another --out_dir"
            )
        # A run that was stopped before its first checkpoint leaves its lock, and may start again.
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "run.lock").exists():
            raise UserError(f"{self.folder} holds other things than a run; choose another --out_dir")

    def find_corpus(self, folder: Path, block_size: int) -> int:
        """Open both splits of the corpus, which must be the one that the checkpoint was trained on; a
        built-in one is made where it is missing. Returns the size of its vocabulary."""
        if parallel.RANK == 0 and not self.checkpoint and not folder.exists():
            data.prepare_dataset(folder.name, folder)
        parallel.wait_for_all()
        self.tokens, self.held_out = (data.Tokens(folder, split, block_size) for split in data.SPLITS)
        meta = self.tokens.meta
        self.corpus = folder
        self.shas = {"corpus": meta["train"]["sha256"], "held_out": meta["val"]["sha256"]}
        for key, sha in self.shas.items():
            if self.checkpoint and self.checkpoint.get(key, sha) != sha:
                trained = f"the corpus that {self.folder} was trained on"
                raise UserError(f"{folder} is not {trained}; use that or a new --out_dir")
        return meta["vocab_size"]

    def open(self, settings: dict, about: dict) -> None:
        """Take the folder, against other runs, and write into it what describes this one."""
        if self.checkpoint:
            print(f"resumed after step {self.start}, from {self.source}")
        self.settings = settings
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.take_folder()
        if not self.checkpoint:
            self.refuse_used_folder()  # another run can have filled it since
        for name in ("meta.json", *data.TOKENIZER_FILES):  # to sample without the corpus
            if (self.corpus / name).exists():
                replace_file(self.folder / name, (self.corpus / name).read_bytes())
        about = {"command": shlex.join(sys.argv), "commit": git_commit()} | self.shas | about
        about |= {"python": platform.python_version(), "torch": torch.__version__}
        about |= {"threads": torch.get_num_threads(), "ranks": parallel.RANKS}
        for name, content in (("config.json", settings), ("run.json", about)):
            replace_file(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())
        self.open_log(self.folder / "log.jsonl")

    def open_log(self, path: Path) -> None:
        """A resumed run drops the lines of steps that came after its checkpoint, and what is no line of a
        log: a killed run can leave half of one."""
        kept = []
        for line in path.read_bytes().splitlines(keepends=True) if self.checkpoint and path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= self.start:
                    kept.append(line)
        replace_file(path, b"".join(kept))
        self.log_file = open(path, "a", encoding="utf-8")

    def restore(self, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
        """Load the optimizers' state from the checkpoint, {name of a parameter: {name of a moment:
        tensor}}."""
        if not self.checkpoint:
            return
        try:
            owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
            parameters = dict(model.named_parameters())
            for name, moments in self.checkpoint["optimizer"].items():
                p = parameters[name]
                for moment, t in moments.items():
                    t = parallel.like(t, p) if t.shape == p.shape else t
                    owner[p].state[p][moment] = t.to(p.device)
        except Exception as e:  # whatever a file can hold in place of tensors
            raise UserError(
                f"{self.source} does not hold the state of this optimizer ({first_line(e)}); go on from its "
                "weights: python -m support.hf RUN FOLDER, then --init_from=hf:FOLDER"
            ) from e

    # --- working ---

    def log(self, step: int, **row) -> None:
        """A line of log.jsonl. A log that cannot be written ends the run, like a checkpoint that cannot."""
        if not self.writes:
            return
        try:
            self.log_file.write(json.dumps({"step": step} | row | {"time": self.seconds}) + "\n")
            self.log_file.flush()
        except OSError as e:
            self.fail(f"cannot write {self.log_file.name}: {e.strerror}", "fix that and resume")

    def report_evaluation(self, step: int, loss: float, goal: float, tokens: int) -> None:
        """A line on the screen and in the log: the held-out loss, and the `goal` by which the best step is
        chosen where that is another."""
        row = {"val_loss": loss, "val_bpb": self.held_out.bits_per_byte(loss)}
        text = f"step {step:5}  val {loss:.4f} nats/token  {row['val_bpb']:.4f} bits/byte"
        if goal != loss:
            row["val_loss_routed"] = goal
            text += f"  {goal:.4f} over drawn plans"
        print(text, flush=True)
        self.log(step, **row, tokens=tokens)
        if not math.isfinite(goal):
            self.fail(f"the loss became {goal} by step {step}", "lower --learning_rate")

    def report(self, step: int, losses: list, lr: float, plans: list[str], tokens_per_step: int, left: int):
        """A line on the screen and in the log. `losses`: loss and gradient norm of the steps since the last
        report, up to this one; `plans`: what was drawn for them; `left`: the steps to come. Fails where a
        loss or a norm is not finite, before anything of it is saved."""
        # One transfer for all steps since the last report.
        losses = torch.stack(losses).tolist()  # waits for a GPU
        for i, pair in enumerate(losses):
            for name, value in zip(("loss", "gradient norm"), pair):
                if not math.isfinite(value):
                    n = len(plans) // len(losses)
                    plan = f"; plan: {', '.join(plans[i * n : (i + 1) * n])}" if plans else ""
                    what = f"the {name} became {value} by step {step - len(losses) + i + 1}{plan}"
                    self.fail(what, "lower --learning_rate")
        loss, speed = losses[-1][0], self.pace.mark(step) * tokens_per_step
        row = {"train_loss": loss, "lr": lr, "tokens": step * tokens_per_step, "tokens_per_s": speed}
        self.log(step, **row, **({"plans": plans} if plans else {}))
        text = f"step {step:5}  loss {loss:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s"
        if speed:  # 0 where the clock has not moved
            text += f"  {duration(left * tokens_per_step / speed)} left"
        print(text + (f"  drew {plans[-1]}" if plans else ""), flush=True)

    def save(self, step: int, model: GPT, optimizers: list[torch.optim.Optimizer], goal: float) -> None:
        """Write ckpt.pt and, where `goal` is the lowest held-out loss so far, best.pt, each next to the old
        one and then renamed."""
        names = ("best.pt", "ckpt.pt") if goal < self.best else ("ckpt.pt",)  # a kill between loses no best
        self.best = min(goal, self.best)
        moments = {p: moments for o in optimizers for p, moments in o.state.items()}
        by_name = {name: moments[p] for name, p in model.named_parameters() if p in moments}
        state = parallel.gathered(
            {"model": model.state_dict(), "optimizer": by_name}
        )  # every rank takes part
        self.pace = Pace(step)  # which leaves out the time that looking and saving took
        if not self.writes:
            return
        tensors = (t for moments in (state["model"], *state["optimizer"].values()) for t in moments.values())
        if not all(t.isfinite().all() for t in tensors):
            self.fail(f"the weights became infinite or nan by step {step}", "lower --learning_rate")
        about = {"step": step, "best_val_loss": self.best, "time": self.seconds} | self.shas
        about |= {"config": self.settings, "model_config": vars(model.config)}
        # In memory first: both files then hold the same bytes, and nothing is replaced by half of one.
        content = io.BytesIO()
        torch.save(state | about, content)
        # The folder may have been removed, or another run may be at work in a new one of its name.
        held, path = os.fstat(self.lock.fileno()), self.folder / "run.lock"
        if not (path.exists() and os.path.samestat(path.stat(), held)):
            self.fail(f"{self.folder} was removed, or is another run's now", "choose another --out_dir")
        for name in names:
            try:
                replace_file(self.folder / name, content.getbuffer())
            except OSError as e:
                what = f"cannot save step {step} to {self.folder / name}: {e.strerror}"
                self.fail(what, "fix that and resume")
            self.saved, self.source = step, self.folder / name

    def close(self, stopped: int) -> None:
        """Say how the run ended, by itself or at the signal of this number, and what can be done next. Ends
        the process of a rank, and one that was stopped."""
        if stopped:
            go_on = f"{parallel.launcher()} --out_dir={quote(self.folder)} --init_from=resume"
            print(f"stopped and saved after step {self.saved}; go on: {go_on}")
            parallel.leave(128 + stopped)
            sys.exit(128 + stopped)
        print(f"{self.folder}: {duration(self.seconds)}, best val {self.best:.4f} nats/token")
        folder = quote(self.folder)
        print(f"next: python sweep.py --out_dir {folder}; python sample.py --out_dir {folder}")
        parallel.leave()

    def fail(self, what: str, cure: str) -> NoReturn:
        """UserError, with the checkpoint that the run can go on from."""
        last = "no checkpoint is there"
        if self.source and self.source.exists():
            last = f"the last good checkpoint is {self.source} of step {self.saved}"
        raise UserError(f"{what}; {last}; {cure}")


class Signals:
    """While it is entered, the first Ctrl-C, `kill` or hang-up is only noted in `received`, so that the step
    under way can be finished and saved; pressed again, it quits immediately."""

    def __enter__(self) -> "Signals":
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in ending_signals()}
        return self

    def note(self, number: int, frame) -> None:
        self.received = number
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # nobody reads it
            os.write(2, b"\nfinishing this step to save it; press again to quit immediately\n")

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
