"""The papers' claims in miniature; runs that are done are not done again.

python experiments.py framework     the nine configurations of arXiv 2410.14442, 2x and 4x smaller cache
python experiments.py runs           runs named on standard input
python experiments.py train VARIANT config/demo.toml --out_dir=...     train.py with a variation
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import kernels
import model as model_file
import train
from cli import Parser, UserError, duration, replace_file, run
from kv_router import Plan, Route, StochasticRouter
from model import GPT, Attention
from sweep import stderr
from train import load_run, window_losses

# --- variations -------------------------------------------------------------------------------------------
# What train.py has no flag for, because only a study needs it: each replaces one piece of the program.


def drawn(routes: Callable[..., list[Route]]) -> tuple:
    """A variation of the stochastic router: routes(rng, n_layer, p, step) in place of the paper's rule."""

    class Router(StochasticRouter):
        def plan(self, step: int) -> Plan:
            rng = random.Random(f"{self.seed}:{step}")
            return Plan(tuple(routes(rng, self.n_layer, self.p, step)))

    return train, "StochasticRouter", Router


def below(rng, n_layer, p, step, bottom_v=False, apart=False):
    """The paper's rule; `bottom_v`: a layer that reads another's K reads V of layer 0; `apart`: and whether
    it does is drawn for K and V apart."""
    routes = [Route((0,), (0,))]
    for i in range(1, n_layer):
        k = rng.randrange(i) if rng.random() < p else i
        v = (0 if k < i else i) if bottom_v else k
        if apart:
            v = 0 if rng.random() < p else i
        routes.append(Route((k,), (v,)))
    return routes


def kept(rng, n_layer, p, step, bottom_v=False):
    """As deployment does: a layer that is not kept reads the nearest kept one below. How many are kept is
    spread evenly (at p = 0.5, from one to all)."""
    p, k, routes = rng.uniform(0, 2 * p), 0, []
    for i in range(n_layer):
        own = i == 0 or rng.random() >= p
        k = i if own else k
        routes.append(Route((k,), (0 if bottom_v and not own else k,)))
    return routes


def alternate(rng, n_layer, p, step, **how):
    """Every second draw is the full plan."""
    return below(rng, n_layer, p if step % 2 else 0.0, step, **how)


def ramp(rng, n_layer, p, step):
    """p grows from 0 over the first 200 draws."""
    return below(rng, n_layer, p * min(1, step / 200), step)


def distilled(self, idx, targets=None, plan=None, cache=None):
    """GPT.forward that trains the full plan on the text, and the drawn one on what the full one predicts, in
    the same step: twice the work."""
    if plan is None or not torch.is_grad_enabled():
        return FORWARD(self, idx, targets, plan, cache)
    teacher, student = (self.lm_head(self.norm(self.hidden(idx, p))).flatten(0, 1) for p in (self.plan, plan))
    divergence = F.kl_div(
        student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="batchmean", log_target=True
    )
    return None, F.cross_entropy(teacher, targets.flatten()) + divergence


FORWARD = GPT.forward


class Untied(Attention):
    """Key gates free for every feature, also the two that RoPE turns together."""

    def _gate(self, sources: tuple[int, ...], start: int, width: int):
        return super()._gate(sources, start, self.head_dim)

    def turn(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return k

    def forward(self, x, cos, sin, ks, vs, strict, seen):
        q = self._turned(self.q_proj(x), self.q_norm, cos, sin)
        k = self.turn(kernels.fuse(ks, self.k_gate), cos, sin)
        y = kernels.attention(q, [k], [kernels.fuse(vs, self.v_gate)])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class BeforeRope(Untied):
    """Keys are fused first and turned then, with free gates; the cache would hold keys before RoPE."""

    def key(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._heads(self.k_proj(x))

    def turn(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return kernels.rotate(k, cos, sin)


class Even(Attention):
    """Gates that start even over their sources."""

    def _gate(self, sources: tuple[int, ...], start: int, width: int):
        gate = super()._gate(sources, start, width)
        return gate if gate is None else torch.nn.Parameter(torch.full_like(gate, 1 / len(sources)))


VARIANTS = {
    "kept": drawn(kept),
    "bottom-v": drawn(lambda *a: below(*a, bottom_v=True)),
    "only-bottom-v": drawn(lambda *a: [Route(r.k, (0,)) for r in below(*a)]),
    "apart": drawn(lambda *a: below(*a, apart=True)),
    "kept-bottom-v": drawn(lambda *a: kept(*a, bottom_v=True)),
    "alternate": drawn(alternate),
    "alternate-bottom-v": drawn(lambda *a: alternate(*a, bottom_v=True)),
    "alternate-apart": drawn(lambda *a: alternate(*a, apart=True)),
    "ramp": drawn(ramp),
    "distilled": (GPT, "forward", distilled),
    "untied": (model_file, "Attention", Untied),
    "before-rope": (model_file, "Attention", BeforeRope),
    "even": (model_file, "Attention", Even),
}


@contextmanager
def varied(name: str):
    """The program with one of VARIANTS in place; with any other name, the program as it is."""
    if name not in VARIANTS:
        yield
        return
    owner, attribute, new = VARIANTS[name]
    old = getattr(owner, attribute)
    setattr(owner, attribute, new)
    try:
        yield
    finally:
        setattr(owner, attribute, old)


# --- runs -------------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Where the runs of one set of experiments are, and what they share. A run is named by the settings that
    set it apart: "--plan=yoco --seed=1", or with a variation "kept --router_p=0.5 --seed=0"."""

    folder: Path
    base: list[str]
    jobs: int

    def path(self, name: str) -> Path:
        return self.folder / re.sub(r"[^\w.+]+", "-", name).strip("-")

    def train(self, names: list[str]) -> None:
        """Train what is not finished, `jobs` at a time; a stopped run is resumed."""
        flags = {name: self.base + name.split() for name in dict.fromkeys(names)}
        finished = {name: self.path(name) / "finished.json" for name in flags}
        todo = [
            n for n in flags if not finished[n].exists() or finished[n].read_text() != json.dumps(flags[n])
        ]
        began, done, children, stopped = time.monotonic(), [], set(), []

        def one(name: str):
            if stopped:
                return
            words = name.split()
            program = ["experiments.py", "train", words.pop(0)] if words[0] in VARIANTS else ["train.py"]
            init = "resume" if any(self.path(name).glob("*.pt")) else "scratch"
            command = [sys.executable, *program, *self.base, *words]
            command += [f"--out_dir={self.path(name)}", f"--init_from={init}"]
            # In a process group of its own: a Ctrl-C reaches it through us, once, and it has time to save.
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, process_group=0, env=os.environ | self.threads()
            )
            children.add(child)
            output, _ = child.communicate()
            children.discard(child)
            if child.returncode:  # it has said why
                stopped.append(abs(child.returncode))
                return
            replace_file(finished[name], json.dumps(flags[name]).encode())
            done.append(name)
            left = (time.monotonic() - began) / len(done) * (len(todo) - len(done))
            last = output.splitlines()[-1].split(": ", 1)[-1]
            print(f"[{len(done)} of {len(todo)}, about {duration(left)} left] {name}: {last}", flush=True)

        if todo:
            print(f"{len(todo)} runs to train, {self.jobs} at a time", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(one, name) for name in todo]
            try:
                for w in waiting:
                    w.result()
            except KeyboardInterrupt:
                stopped.append(130)
                for child in children:
                    child.send_signal(signal.SIGINT)
        if stopped:
            sys.exit(stopped[0])

    def threads(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}


NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]


def train_all(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train every run (name -> flags) into folder/name; a finished one is skipped, a stopped one resumed."""

    def finished(name: str) -> Path:
        return folder / name / "finished.json"  # holds the flags it was finished with

    todo = [n for n in runs if not finished(n).exists() or finished(n).read_text() != json.dumps(runs[n])]
    began = time.monotonic()
    for done, name in enumerate(todo):
        left = (
            f", about {duration((time.monotonic() - began) / done * (len(todo) - done))} left" if done else ""
        )
        print(f"[{done + 1} of {len(todo)}{left}] {name}", flush=True)
        init = "resume" if any((folder / name).glob("*.pt")) else "scratch"
        command = [
            sys.executable,
            "train.py",
            *runs[name],
            f"--out_dir={folder / name}",
            f"--init_from={init}",
        ]
        # In a process group of its own: a Ctrl-C reaches it through us, once, and it has time to save.
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as child:
            output = None
            while output is None:
                try:
                    output, _ = child.communicate()
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)
        if lines := output.splitlines():
            print("    " + lines[-1], flush=True)
        if child.returncode:
            sys.exit(abs(child.returncode))  # train.py has said why
        replace_file(finished(name), json.dumps(runs[name]).encode())


def interleaved(
    models: dict[str, GPT], measure: Callable[[GPT], float], repeats: int = 7
) -> dict[str, float]:
    """The median of `measure` for every model, all taking turns, after one warm-up: machines are noisy."""
    values = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            value = measure(model)
            values[name] += [value] if repeat else []
    return {name: median(v) for name, v in values.items()}


def framework(folder: Path, seeds: int, max_iters: int) -> None:
    """The main table of arXiv 2410.14442 in miniature: quality and speed of the nine configurations, each
    trained on the same tokens. Some of them are one and the same plan at 8 layers and are trained once."""
    n_layer = 8
    shrink = {"full": 1} | {f"{name}:{n_layer // x}": x for x in (2, 4) for name in NINE}
    first = {}  # plan -> the first configuration that means it
    for spec in shrink:
        first.setdefault(Plan.parse(spec, n_layer), spec)
    length = [f"--max_iters={max_iters}", f"--warmup_iters={max_iters // 10}", f"--eval_interval={max_iters}"]
    names = {
        (spec, seed): f"seed{seed}/{spec.replace(':', '-')}"
        for seed in range(seeds)
        for spec in first.values()
    }
    train_all(
        folder,
        {
            name: ["config/demo.toml", f"--plan={spec}", f"--seed={seed}", *length]
            for (spec, seed), name in names.items()
        },
    )

    losses, models = {spec: [] for spec in first.values()}, {}
    for (spec, _), name in names.items():
        models[spec], config = load_run(folder / name)
        tokens = data.Tokens(Path(config.data_dir) / config.dataset, "val", config.block_size)
        losses[spec].append(window_losses(models[spec], tokens, 128, 16))
    x, y = tokens.windows(range(0, 4 * config.block_size, config.block_size))
    prompt = x[:1, :192]

    def train_step(model: GPT) -> float:
        began = time.perf_counter()
        model(x, y)[1].backward()
        return time.perf_counter() - began

    def ttft(model: GPT) -> float:
        began = time.perf_counter()
        next(model.stream(prompt, 1, temperature=0))
        return time.perf_counter() - began

    def tpot(model: GPT) -> float:
        times = [time.perf_counter() for _ in model.stream(prompt, 33, temperature=0)]
        return (times[-1] - times[0]) / 32

    step_s, ttft_s, tpot_s = (interleaved(models, measure) for measure in (train_step, ttft, tpot))
    rows = []
    for spec, x_smaller in shrink.items():
        plan = Plan.parse(spec, n_layer)
        same = first[plan]
        rows.append({"plan": spec, "shrink": x_smaller, "same_as": same, "cyclic": plan.cyclic})
        by_seed = [float(windows.mean()) for windows in losses[same]]
        above = sum(own - full for own, full in zip(losses[same], losses["full"])) / seeds
        rows[-1] |= {"cache_ratio": plan.cache_ratio, "loss_by_seed": by_seed, "loss": mean(by_seed)}
        rows[-1] |= {"delta": float(above.mean()), "delta_stderr": stderr(above)}
        rows[-1] |= {"train_step_ms": 1e3 * step_s[same], "ttft_ms": 1e3 * ttft_s[same]}
        rows[-1] |= {"tokens_per_s": 1 / tpot_s[same]}
    columns = ["plan", "cache", "loss", "above full", "training step", "first token", "decode", ""]
    text = f"""{seeds} seed(s), {max_iters} steps of 1,024 tokens. Loss in nats/token, mean of the seeds
(smallest to largest); above full: paired over 128 held-out windows, with the standard error over windows.
Times are medians of 7 interleaved repeats: forward and backward of one batch, first token of a prompt of 192
tokens, and greedy decoding of 32 more.

| {" | ".join(columns)} |
{"|---" * len(columns)}|
"""
    for r in rows:
        low, high = min(r["loss_by_seed"]), max(r["loss_by_seed"])
        spread = f" ({low:.3f} to {high:.3f})" if seeds > 1 else ""
        above = f"{r['delta']:+.3f} +- {r['delta_stderr']:.3f}" if r["shrink"] > 1 else ""
        note = "cyclic" if r["cyclic"] else ""
        note = note if r["same_as"] == r["plan"] else f"the same plan as `{r['same_as']}`"
        cells = [f"`{r['plan']}`", f"{r['cache_ratio']:.0%}", f"{r['loss']:.3f}{spread}", above]
        cells += [
            f"{r['train_step_ms']:.0f} ms",
            f"{r['ttft_ms']:.0f} ms",
            f"{r['tokens_per_s']:.0f}/s",
            note,
        ]
        text += f"| {' | '.join(cells)} |\n"
    print(text)
    (folder / "framework.md").write_text(text)
    (folder / "framework.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_framework(rows, folder / "framework.png")
    print(f"wrote framework.md, framework.jsonl and framework.png to {folder}")


def draw_framework(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 4), dpi=150, sharey=True)
    labels = {"loss": "held-out loss, nats per token", "train_step_ms": "training step, ms"}
    for ax, (key, label) in zip(axes, labels.items()):
        for x, marker, fill in ((2, "o", "black"), (4, "s", "white")):
            points = [(r[key], NINE.index(r["plan"].split(":")[0])) for r in rows if r["shrink"] == x]
            ax.plot(*zip(*points), marker, mec="black", mfc=fill, label=f"cache {x}x smaller")
        ax.axvline(rows[0][key], color="black", linestyle="--", linewidth=1, label="full cache")
        ax.set_xlabel(label)
        ax.grid(alpha=0.25)
    axes[0].set_yticks(range(9), NINE)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


BASE = "config/demo.toml --n_kv_head=4 --max_iters=300 --warmup_iters=30 --eval_interval=100 --eval_iters=8"


def main():
    if sys.argv[1:2] == ["train"] and len(sys.argv) > 2:
        name = sys.argv[2]
        if name not in VARIANTS:
            raise UserError(f"no variation {name!r}; valid are {', '.join(VARIANTS)}")
        del sys.argv[1:3]
        with varied(name):
            train.main()
        return
    parser = Parser(__doc__)
    parser.add_argument("experiment", choices=["framework", "runs"], help="which one to run")
    parser.add_argument("--out_dir", default="out", help="results go to OUT_DIR/EXPERIMENT [out]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind [1]")
    parser.add_argument("--max_iters", type=int, default=400, help="training steps per run [400]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time [one a core]")
    args = parser.parse_args()
    if args.seeds < 1 or args.max_iters < 10:
        raise UserError("--seeds must be 1 or more and --max_iters 10 or more")
    if args.experiment == "framework":
        framework(Path(args.out_dir) / args.experiment, args.seeds, args.max_iters)
    else:  # named on standard input
        lab = Lab(Path(args.out_dir) / "experiments", BASE.split(), args.jobs)
        lab.train([line.strip() for line in sys.stdin if line.strip()])


if __name__ == "__main__":
    run(main)
