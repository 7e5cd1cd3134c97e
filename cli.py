"""What the scripts share at the command line: one-line errors, settings from TOML and flags, time left."""

import argparse
import difflib
import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from pathlib import Path

from kv_router import PlanError, human


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what was wrong, what is valid, the fix."""


def suggest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' where something known is close to `word`, else ''."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (exit status 2) and `-` read as `_` in the names of flags."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        flags = list(self._option_string_actions)
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition("=")
            flag = "--" + name[2:].replace("-", "_")
            words.append(flag + equals + value if name[:2] == "--" and flag in flags else word)
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            self.error(
                f"unknown argument {unknown[0]}{suggest(unknown[0].split('=')[0], flags)} (--help lists all)"
            )
        return parsed

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def run(main: Callable[[], None]):
    """Run a script's main(); a user's mistake becomes one line and exit status 2."""
    name = os.path.basename(sys.argv[0])
    if hasattr(
        sys.stdout, "reconfigure"
    ):  # generated text must not stop a run where the terminal lacks a letter
        sys.stdout.reconfigure(errors="replace")

    def fail(message: str):
        rank = os.environ.get("RANK", "0")
        where = name if rank == "0" else f"{name} on rank {rank}"
        print(f"{where}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    try:
        main()
    except (UserError, PlanError) as e:
        fail(str(e))
    except BrokenPipeError:  # the reader (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:  # no space, no permission, a file where a folder should be
        if e.filename is None and e.errno is None:
            raise
        fail(f"{e.filename or 'the disk'}: {e.strerror}")
    except (MemoryError, RuntimeError) as e:  # torch's allocators raise RuntimeErrors, known by their text
        if not isinstance(e, MemoryError) and not re.search("out of memory|allocate memory", str(e)):
            raise
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        what = f"out of memory, after a peak of {human(peak, 'B')} ({first_line(e)[:200]})"
        fail(f"{what}; lower --batch_size (of bench.py: --batch), or the sizes of the model")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)


def setting(default, help: str, choices: Sequence | None = None):
    """A dataclass field that is also a flag and a TOML key."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def given_settings(cls, description: str) -> dict:
    """The settings of dataclass `cls` that the user gave: from a TOML file, if named, then from flags."""
    parser = Parser(description)
    parser.usage = "%(prog)s [config/x.toml] [--key=value ...]"
    parser.add_argument("config", nargs="?", help="a TOML file of settings, for example config/demo.toml")
    for f in fields(cls):
        kind = {"type": _boolean, "nargs": "?", "const": True} if f.type is bool else {"type": f.type}
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        metavar = None if f.metadata["choices"] else f.type.__name__.upper()
        parser.add_argument(
            f"--{f.name}", default=None, help=help, metavar=metavar, choices=f.metadata["choices"], **kind
        )
    args = vars(parser.parse_args())
    path = args.pop("config")
    flags = {name: value for name, value in args.items() if value is not None}
    return (read_toml(path, cls) if path else {}) | checked(flags, cls, "the command line")


def read_toml(path: str, cls) -> dict:
    """The settings in a TOML file, checked against the fields of dataclass `cls`."""
    try:
        with open(path, "rb") as file:
            settings = tomllib.load(file)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; config/ holds the presets") from e
    except (ValueError, RecursionError) as e:  # bad syntax, no UTF-8, a thousand nested brackets
        raise UserError(f"{path} is not TOML: {first_line(e)}") from e
    return checked(settings, cls, path)


def checked(settings: object, cls, where: object) -> dict:
    """`settings`, read from `where`, if they are a dict of fields of dataclass `cls` with their types."""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(settings, dict):
        raise UserError(f"{where} holds no settings")
    settings = dict(settings)
    for key, value in settings.items():
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r}{suggest(str(key), list(known))} (train.py --help lists all)"
            )
        kind, choices = known[key].type, known[key].metadata.get("choices")
        if kind is float and type(value) is int and abs(value) < 1 << 63:
            value = settings[key] = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{where}: {key} = {value!r} is not a {getattr(kind, '__name__', kind)}")
        if choices and value not in choices:
            raise UserError(f"{where}: {key} = {value!r} is not one of {', '.join(map(str, choices))}")
        if isinstance(value, str) and not value.isprintable():  # no path, plan or device has such characters
            raise UserError(f"{where}: {key} = {value!r} has characters that cannot be printed")
    return settings


def read_json(path: Path, fix: str) -> dict:
    """The JSON object in a file; UserError, naming the `fix`, where it is missing, damaged or something else.
    A "checksum" in it (see `sealed`) must be right."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        if "checksum" in value and value != sealed(value):
            raise ValueError("its checksum does not match")
        return value
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; {fix}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON or damaged: {first_line(e)}; {fix}") from e


def sealed(value: dict) -> dict:
    """`value` with the checksum of all its other entries, so that a changed digit is noticed."""
    text = json.dumps({key: value[key] for key in sorted(value) if key != "checksum"}, sort_keys=True)
    return value | {"checksum": hashlib.sha256(text.encode()).hexdigest()}


def sha256(path: Path) -> str:
    """About a second per GB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: whenever a machine stops, the old file is there or the new
    one, never half of one."""
    work = path.with_name(path.name + ".tmp")
    work.unlink(missing_ok=True)  # what a killed run left
    try:
        with open(work, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)  # a full disk needs the room
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too
    os.close(folder)


def first_line(e: Exception) -> str:
    """An exception's message cut to one line, or its name where it has none."""
    return next(iter(str(e).splitlines()), type(e).__name__)


def duration(seconds: float) -> str:
    """75 -> '1m15s'"""
    s = int(seconds + 0.5)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02}s" if s < 3600 else f"{s // 3600}h{s // 60 % 60:02}m"


class Progress:
    """A line that shows how far a long piece of work is and the time left (every 10 s in a log file)."""

    def __init__(self, what: str, total: float | None = None):
        self.what, self.total, self.start, self.shown = what, total, time.monotonic(), 0.0
        self.live, self.open = sys.stderr.isatty(), False

    def __call__(self, done: float, note: str = ""):
        now, finished = time.monotonic(), self.total is not None and done >= self.total
        if not finished and now - max(self.shown, self.start) < (0.2 if self.live else 10):
            return
        self.shown, spent = now, now - self.start
        text = f"{self.what} {note}  {duration(spent)}"
        if self.total is not None and not finished:
            left = duration(spent * (self.total / done - 1)) if done else "?"
            text = f"{self.what} {done / self.total:4.0%} {note}  {left} left"
        end = "\n" if finished or not self.live else ""
        self.open = not end
        print(f"\r{text:<78}" if self.live else text, end=end, file=sys.stderr, flush=True)

    def close(self):
        """End a line that is still open, so that what comes next starts on its own."""
        if self.open:
            print(file=sys.stderr, flush=True)
        self.open = False
