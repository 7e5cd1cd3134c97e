"""What the commands share: one-line errors, settings from TOML files and flags, files that are written whole,
progress, tables."""

import argparse
import difflib
import errno
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path

from kv_router import PlanError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

# --- errors -----------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: what was wrong, what is valid, the fix."""


def one_line(message: str) -> str:
    """`message` on one line, with words of absurd length cut short."""
    return " ".join(word if len(word) <= 200 else word[:197] + "..." for word in message.split())


def first_line(e: Exception) -> str:
    """The first line of an exception's message, or its name where it has none."""
    return next(iter(str(e).splitlines()), type(e).__name__)


def suggest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' where something known is close to `word`, otherwise ''."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def out_of_memory(e: BaseException) -> bool:
    """Whether memory ran out. torch's allocators raise RuntimeErrors that only their text tells from
    others."""
    return isinstance(e, MemoryError) or (
        isinstance(e, RuntimeError) and re.search("out of memory|allocate memory", str(e)) is not None
    )


class Lasting(io.TextIOBase):
    """Standard output or error that no longer stops the work once nobody reads it: a pipe that was closed, a
    terminal that is gone, a full disk. What cannot be written is lost."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def lasting(self, write: Callable, *args):
        try:
            return write(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str):
        return self.lasting(self.stream.write, text)

    def flush(self):
        self.lasting(self.stream.flush)


def run(main: Callable[[], None], only_prints: bool = False):
    """Run a script's main(). A user's mistake becomes one line on standard error and exit status 2. Only a
    script that `only_prints` ends when nobody reads its output any more."""
    script = os.path.basename(sys.argv[0])
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed: files that are opened later must not take its place
            while os.open(os.devnull, os.O_RDWR) < number:
                pass
            setattr(sys, name, open(number, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # characters that the terminal cannot print must not stop a run
            stream.reconfigure(errors="replace")
            if not only_prints:
                setattr(sys, name, Lasting(stream))

    def fail(message: str):
        rank = os.environ.get("RANK") or "0"
        where = script if rank == "0" else f"{script} on rank {rank}"
        print(f"{where}: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)

    for number in ending_signals():
        signal.signal(number, signal.default_int_handler)  # all clean up as Ctrl-C does
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
        fail(f"cannot read or write {e.filename or 'the disk'}: {e.strerror}")
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        fail(f"out of memory ({first_line(e)[:200]}); lower --batch_size, --batch or the sizes of the model")
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        sys.exit(130)


def ending_signals() -> list[int]:
    """Ctrl-C, `kill` and a lost terminal, as far as they are not ignored: nohup is to last."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [n for n in map(signal.Signals.__getitem__, names) if signal.getsignal(n) != signal.SIG_IGN]


# --- settings ---------------------------------------------------------------------------------------------


def user_path(text: str) -> str:
    """A type for add_argument: a path, where `~` is the home folder, also after `hf:` or `FILE:`."""
    kind, tilde, rest = re.fullmatch(r"(hf:|FILE:)?(~?)(.*)", text, re.DOTALL).groups(default="")
    return kind + (os.path.expanduser(tilde + rest) if tilde else rest)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, exit status 2, and flags that may be spelled with `-` for `_`."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self) -> argparse.Namespace:
        known = self._option_string_actions
        words = []
        for word in sys.argv[1:]:
            # Only the flag's own name is changed, never a value.
            name, equals, value = word.partition("=")
            flag = "--" + name[2:].replace("-", "_")
            words.append(flag + equals + value if flag in known else word)
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0]
            close = suggest(word.partition("=")[0], known)
            if not word.startswith("-"):  # a bare path
                flag = next((name for name in ("--out_dir", "--input") if name in known), "a flag with")
                close = f"; did you mean {flag} {word}?"
            self.error(f"unknown argument {word}{close} (--help lists all)")
        return parsed

    def error(self, message: str):
        word = next(iter(sys.argv[1:]), "-")
        if message.endswith("required: --out_dir") and not word.startswith("-"):  # a bare path
            message += f"; did you mean --out_dir {word}?"
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def at_least(low: float, below: float = 1 << 31) -> Callable[[str], float]:
    """A type for add_argument: a number of the type of `low`, from `low` to under `below`."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value < below:
            limit = f"below {below}" if value >= below else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is not valid; it must be {limit}")
        return value

    number.__name__ = type(low).__name__  # for argparse's own message where the text is no number
    return number


def setting(default, help: str, choices: Sequence | None = None, low: float = 0, below: float | None = None):
    """A dataclass field that is also a flag and a TOML key: one of the choices, or a number from `low` to
    under `below`, by default 2**31 or 1e30."""
    below = below or (1 << 31 if isinstance(default, int) else 1e30)
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "below": below})


def given_settings(cls, description: str) -> dict:
    """The settings of dataclass `cls` that the user gave: from a TOML file, if one is named, then from
    flags."""
    parser = Parser(description)
    parser.usage = "%(prog)s [config/x.toml] [--key=value ...]"
    parser.add_argument(
        "config", type=user_path, nargs="?", help="a TOML file of settings, for example config/demo.toml"
    )
    kinds = {f.name: f.type for f in fields(cls)}
    for f in fields(cls):
        default = "auto" if f.default is None else f.default
        options = {"help": f"{f.metadata['help']} [{default}]".replace("%", "%%"), "metavar": "VALUE"}
        if f.type in (bool, bool | None):  # --compile alone means --compile=true
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)
    flags = vars(parser.parse_args())
    path = flags.pop("config")
    flags = {name: converted(text, kinds[name]) for name, text in flags.items()}
    return (read_toml(path, cls) if path else {}) | checked(flags, cls)


def converted(text: str, kind) -> object:
    """The value of a flag, or its text where that is none; `checked` says what is wrong with it."""
    if kind in (bool, bool | None):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def read_toml(path: str, cls) -> dict:
    """The settings in a TOML file, checked against the fields of dataclass `cls`."""
    text = read_text(Path(path))
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # bad syntax, no UTF-8, a thousand nested brackets
        raise UserError(f"{path} is not TOML: {first_line(e)}") from e
    return checked(settings, cls, path)


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
KINDS[bool | None] = "true, false or auto"


def checked(settings: object, cls, where: object = None) -> dict:
    """`settings`, from the command line or read from `where`, after checking that they are fields of
    dataclass `cls`, of the right type, and valid; `~` is expanded."""
    if not isinstance(settings, dict):
        raise UserError(f"{where} holds no settings")
    known = {f.name: f for f in fields(cls)}
    result = {}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), known)} (--help lists all)")
        name = f"{where}: {key} =" if where else f"--{key}"
        kind, about = known[key].type, known[key].metadata
        if kind is float and type(value) is int and abs(value) < 1 << 63:
            value = float(value)
        if kind == bool | None and value == "auto":
            value = None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | None)):
            raise UserError(f"{name} {value!r} is not {KINDS.get(kind, f'a {kind}')}")
        if about.get("choices") and value not in about["choices"]:
            raise UserError(f"{name} {value!r} is not one of {', '.join(map(str, about['choices']))}")
        low, below = about.get("low", -math.inf), about.get("below", math.inf)
        if kind in (int, float) and not low <= value < below:
            limit = f"below {below}" if value >= below else f"{low} or more"
            raise UserError(f"{name} {value} is not valid; it must be {limit}")
        if isinstance(value, str) and re.search(r"^$|[\x00-\x1f\x7f]", value):
            raise UserError(f"{name} {value!r} is empty, or has control characters")
        result[key] = user_path(value) if isinstance(value, str) else value
    return result


def merged(before: dict, given: dict, free: Iterable[str], where: object) -> dict:
    """The settings `before`, which `where` holds, with those that are `given` now. Only the `free` ones may
    differ; UserError for any other."""
    for name, value in given.items():
        if name not in before or value == before[name]:
            continue
        if name not in free:
            raise UserError(
                f"--{name} {value} contradicts {where}, which has {before[name]}; leave it out, or start a "
                "new run in another --out_dir"
            )
        print(f"--{name} {value} in place of {before[name]}")
    return before | given


# --- files ------------------------------------------------------------------------------------------------


def read_json(path: Path, fix: str, lines: bool = False) -> dict | list[dict]:
    """The JSON object in a file, or with `lines` one in every line. UserError, which names the `fix`, where
    the file is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(part) for part in (text.splitlines() if lines else [text])]
        if not all(isinstance(value, dict) for value in found):
            raise ValueError("not an object")
        return found if lines else found[0]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; {fix}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON or damaged: {first_line(e)}; {fix}") from e


def read_text(path: Path) -> str:
    """The UTF-8 text in a file, without a byte-order mark. UserError where it is something else."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, not UTF-8 text; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text (byte {e.start}); convert it, for example with iconv -t UTF-8"
        ) from e


def replace_file(path: Path, content: bytes) -> None:
    """Write a file next to `path`, flush it to the disk, and rename it: whenever the machine stops, either
    the old file is there or the new one, never half of one."""
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    work.unlink(missing_ok=True)  # left by a killed run
    try:
        with open(work, "xb") as file:
            if path.exists():
                shutil.copymode(path, work)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException as e:
        work.unlink(missing_ok=True)  # a full disk needs the room
        if isinstance(e, OSError):
            e.filename = e.filename or str(path)
        raise
    if os.name == "posix":  # the new name must reach the disk too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


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


@contextmanager
def new_folder(folder: Path, replace: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end: it appears whole or not at all.
    UserError where something is there already that is neither empty nor, by `replace`, to be replaced."""

    folder = folder.resolve()  # where a link leads, and `.` by its name

    def check() -> None:
        in_the_way = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if folder == Path.cwd() or (in_the_way and not (folder.is_dir() and replace(folder))):
            raise UserError(f"{folder} is there and holds other things; choose a new name, or move it away")

    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*.new"):
        with suppress(OSError, AttributeError):  # its process is still at work, or there are no locks here
            fcntl.flock(open(left / "lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    work = folder.with_name(f".{folder.name}-{os.urandom(4).hex()}.new")
    work.mkdir()
    try:
        held = lock(work / "lock")
        yield work
        held.close()
        (work / "lock").unlink()
        check()
        # A folder cannot be replaced in one step: the old one makes way first.
        old = work.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        e.filename = e.filename or str(folder)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_lines(rows: Iterable[dict], path: Path) -> None:
    """A .jsonl file: one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# --- output -----------------------------------------------------------------------------------------------


def quote(path: object) -> str:
    """A path as a shell wants it, for a command that can be pasted."""
    return shlex.quote(str(path))


def human(n: float, unit: str = "") -> str:
    """1536 -> '1.54 k'; powers of 1000, three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5 or prefix == "T":
            return f"{n:.3g} {prefix}{unit}".rstrip()
        n /= 1000


def duration(seconds: float) -> str:
    """75 -> '1m15s'"""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02}s" if s < 3600 else f"{s // 3600}h{s // 60 % 60:02}m"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of aligned columns, the first row being the header: the first `left` columns flush left, the
    others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Pace:
    """How fast work has gone lately: over the last few marks, so that a slow start is soon forgotten."""

    def __init__(self, done: float = 0, marks: int = 6):
        self.marks = deque([(time.monotonic(), done)], maxlen=marks)

    def mark(self, done: float) -> float:
        """Note how much is done by now. Returns the units of work per second; 0 until they are known."""
        self.marks.append((time.monotonic(), done))
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - start) if end > start else 0.0


class Progress:
    """A line that shows how far a long piece of work is and the time left. In a terminal it is rewritten in
    place, in a log file a new one is written every ten seconds."""

    def __init__(self, what: str, total: float | None = None):
        self.what, self.total, self.shown = what, total, time.monotonic()
        self.live = sys.stderr.isatty()
        self.pace = Pace(marks=100 if self.live else 6)

    def __call__(self, done: float, note: str = ""):
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 10):
            return
        self.shown, rate = now, self.pace.mark(done)
        text = f"{self.what} {note}"
        if self.total:
            left = duration(max(0, self.total - done) / rate) if rate else "?"
            text = f"{self.what} {min(1, done / self.total):4.0%} {note}  {left} left"
        print(
            f"\r{text:<78}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True
        )

    def close(self):
        """Take the line away, so that what comes next starts on its own."""
        if self.live:
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
