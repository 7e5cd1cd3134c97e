"""The runs of all studies: trained where they are missing, and measured once."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import data
from cli import Pace, duration, replace_file
from devices import autocast, pick_device, pick_dtype
from lab.studies.variants import VARIANTS
from model import GPT
from runs import load_run, window_losses

SEEDS = 3


@dataclass
class Workbench:
    """One set of runs: where they are, and the settings that they share. A run is named by the settings
    that set it apart, "--plan=yoco --seed=1", after the name of a variation if it has one, "falling
    --router_p=0.5 --seed=0"."""

    name: str
    folder: Path
    base: list[str]
    narrow: str  # settings of a narrower model
    wide: str  # and of a wider one
    n_layer: int
    steps: int
    used: list[str] = field(default_factory=list)  # the runs that the current study has asked for
    loaded: tuple = ("", None)  # the run that `load` gave last
    context: Callable = nullcontext  # what its losses are computed in

    @property
    def pictures(self) -> Path:
        return Path("results" if self.name == "cpu" else f"results_{self.name}")

    def path(self, run: str) -> Path:
        return self.folder / re.sub(r"[^\w.+]+", "-", run).strip("-")

    @property
    def shares(self) -> list[float]:
        """The shares of a full cache at which models are compared. The last is that of K and V of one layer,
        and the last but one that of K of two layers and V of one."""
        return sorted({1.0, 0.75, 0.5, 0.25, 1.5 / self.n_layer, 1 / self.n_layer}, reverse=True)

    # --- training ---

    def train(self, runs: Iterable[str]) -> None:
        """Train the runs that are not finished, one after the other. One that was stopped is resumed."""
        runs = list(dict.fromkeys(runs))
        self.used += [run for run in runs if run not in self.used]
        todo = [run for run in runs if not self.finished(run)]
        pace = Pace()
        pace.mark(time.monotonic(), 0)
        for done, run in enumerate(todo, 1):
            self.begin(run)
            status, last = execute(self.command(run))
            if status:  # train.py has said why
                print(last, flush=True)
                sys.exit(abs(status))
            (self.path(run) / "finished").touch()
            pace.mark(time.monotonic(), done)
            left = duration((len(todo) - done) / pace.rate)
            print(f"[{done} of {len(todo)}, about {left} left] {last}", flush=True)

    @property
    def recipe(self) -> bytes:
        """The settings that all runs share, with the text of a file that is among them."""
        words = [Path(word).read_text() if word.endswith(".toml") else word for word in self.base]
        return json.dumps(words).encode()

    def begun(self, run: str) -> bool:
        path = self.path(run) / "recipe.json"
        return path.exists() and path.read_bytes() == self.recipe

    def finished(self, run: str) -> bool:
        return self.begun(run) and (self.path(run) / "finished").exists()

    def begin(self, run: str) -> None:
        """Make the run's folder. What was trained there with other settings is deleted."""
        if not self.begun(run):
            shutil.rmtree(self.path(run), ignore_errors=True)
            self.path(run).mkdir(parents=True)
            replace_file(self.path(run) / "recipe.json", self.recipe)

    def command(self, run: str) -> list[str]:
        words = run.split()
        program = ["train.py"]
        if words and words[0] in VARIANTS:
            program = ["-m", "lab.studies", "train", words.pop(0)]
        if any(self.path(run).glob("*.pt")):  # it was stopped
            words.append("--init_from=resume")
        return [sys.executable, *program, *self.base, *words, f"--out_dir={self.path(run)}"]

    # --- measuring ---

    def load(self, run: str) -> tuple[GPT, data.Tokens]:
        """A run's model, and held-out text of the corpus that it was trained on."""
        if self.loaded[0] != run:
            variant = VARIANTS.get(run.split()[0] if run else "", {})
            device = pick_device("auto")
            model, config = load_run(self.path(run), device, variant.get("model_class", GPT))
            tokens = data.Tokens(Path(config.data_dir) / config.dataset, "val", config.block_size)
            self.context = partial(autocast, device, pick_dtype(config.dtype, device)[0])
            self.loaded = run, (model, tokens)
        return self.loaded[1]

    def log(self, run: str, key: str) -> tuple[list[int], list[float]]:
        """The steps at which the run's log has `key`, and its values there."""
        rows = map(json.loads, (self.path(run) / "log.jsonl").read_text().splitlines())
        pairs = [(row["step"], row[key]) for row in rows if key in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def measured(self, run: str, key: str, measure: Callable[[], Iterable[float]]) -> np.ndarray:
        """What `measure` finds of a run. It is called once; the values are kept with the run."""
        path = self.path(run) / "measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            known[key] = [round(float(x), 6) for x in measure()]
            replace_file(path, json.dumps(known).encode())
        return np.array(known[key])

    def windows(self, run: str, plan: str = "", split: str = "val", n: int = 64) -> np.ndarray:
        """The loss of each of n windows of a run under a plan, by default its own, in nats per token."""

        def measure():
            model, tokens = self.load(run)
            tokens = data.Tokens(tokens.path.parent, split, tokens.block_size)
            return window_losses(model, tokens, n, 16, model.resolve(plan or None), self.context)

        return self.measured(run, f"loss {plan} {split} {n}", measure)

    def losses(self, settings: str, plan: str = "") -> np.ndarray:
        """The mean loss of every seed's run, (seeds,)."""
        return np.array([self.windows(run, plan).mean() for run in seeded(settings)])


def execute(command: list[str]) -> tuple[int, str]:
    """Run a training to its end, or until a signal. Returns its exit status, and what it printed last."""
    # In a process group of its own: Ctrl-C reaches it through us, once, and it has time to save.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as child:
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            output, _ = child.communicate()
    lines = [line for line in output.splitlines() if not line.startswith("next:")]
    return child.returncode, lines[-1] if lines else ""


def seeded(settings: str) -> list[str]:
    """The runs of some settings, one a seed. Equal seeds see the same batches in the same order."""
    return [f"{settings} --seed={seed}".strip() for seed in range(SEEDS)]
