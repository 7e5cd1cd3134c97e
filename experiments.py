"""The papers' claims in miniature; runs that are done are not done again.

python experiments.py cache          one experiment; its tables go into RESULTS.md
python experiments.py all            every one of them (make results)
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import kernels
import model as model_file
import train
from cli import Parser, UserError, duration, replace_file, run, sealed, sha256
from kv_router import Plan, PlanError, Route, StochasticRouter, costs, human
from model import GPT, Attention
from sweep import LOOKS, draw, stderr
from train import TrainConfig, load_run, pick_device, window_losses

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
    """One set of experiments: where its runs are, and what they share. A run is named by the settings that
    set it apart: "--plan=yoco --seed=1", or with a variation "kept --router_p=0.5 --seed=0"."""

    name: str
    folder: Path
    base: list[str]
    small: str  # settings of a narrower and of a wider model
    large: str
    n_layer: int
    steps: int
    jobs: int
    used: list[str] = field(default_factory=list)  # runs, since the last section
    last: tuple = ("", None)  # what `load` gave last

    @property
    def pictures(self) -> Path:
        return Path("results" if self.name == "cpu" else f"results_{self.name}")

    @property
    def tokens_per_step(self) -> int:
        _, c = self.load("--seed=0")
        return c.batch_size * c.gradient_accumulation_steps * c.block_size

    def path(self, name: str) -> Path:
        return self.folder / re.sub(r"[^\w.+]+", "-", name).strip("-")

    def train(self, names: Iterable[str]) -> None:
        """Train what is not finished, `jobs` at a time; a stopped run is resumed."""
        flags = {name: self.base + name.split() for name in names}
        self.used += flags
        finished = {name: self.path(name) / "finished.json" for name in flags}
        todo = [
            n for n in flags if not finished[n].exists() or finished[n].read_text() != json.dumps(flags[n])
        ]
        began, done, children, stopped = time.monotonic(), [], set(), []

        def one(name: str) -> None:
            if stopped:
                return
            words = name.split()
            program = ["experiments.py", "train", words.pop(0)] if words[0] in VARIANTS else ["train.py"]
            init = "resume" if any(self.path(name).glob("*.pt")) else "scratch"
            command = [sys.executable, *program, *self.base, *words]
            command += [f"--out_dir={self.path(name)}", f"--init_from={init}"]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
            # In a process group of its own: a Ctrl-C reaches it through us, once, and it has time to save.
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, process_group=0, env=os.environ | threads
            )
            children.add(child)
            output, _ = child.communicate()
            children.discard(child)
            last = (output.splitlines() or [""])[-1]
            if child.returncode:  # train.py has said why
                stopped.append(abs(child.returncode))
                print(last, flush=True)
                return
            replace_file(finished[name], json.dumps(flags[name]).encode())
            done.append(name)
            left = duration((time.monotonic() - began) / len(done) * (len(todo) - len(done)))
            print(f"[{len(done)} of {len(todo)}, about {left} left] {last}", flush=True)

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

    def load(self, name: str) -> tuple[GPT, TrainConfig]:
        """A run's model and settings; the last one loaded is kept."""
        if self.last[0] != name:
            with varied(name.split()[0]):
                self.last = name, load_run(self.path(name), pick_device("auto"))
        return self.last[1]

    def tokens(self, name: str, split: str = "val") -> data.Tokens:
        _, config = self.load(name)
        return data.Tokens(Path(config.data_dir) / config.dataset, split, config.block_size)

    def log(self, name: str, key: str) -> tuple[list[int], list[float]]:
        """Steps, and what the run's log says of `key` there."""
        rows = map(json.loads, (self.path(name) / "log.jsonl").read_text().splitlines())
        pairs = [(row["step"], row[key]) for row in rows if key in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def cached(self, name: str, key: str, measure: Callable[[], list[float]]) -> np.ndarray:
        """What `measure` says of a run; asked once, and kept with it."""
        path = self.path(name) / "measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        finished = (self.path(name) / "finished.json").read_text()
        known = known if known.get("finished") == finished else {"finished": finished}
        if key not in known:
            known[key] = [round(float(x), 6) for x in measure()]
            replace_file(path, json.dumps(known).encode())
        return np.array(known[key])

    def windows(self, name: str, plan: str = "", split: str = "val", n: int = 64) -> np.ndarray:
        """Loss of each of n windows of a run under a plan, by default its own; nats per token."""

        def measure():
            model, _ = self.load(name)
            return window_losses(model, self.tokens(name, split), n, 16, model.resolve(plan or None))

        return self.cached(name, f"loss {plan} {split} {n}", measure)

    def loss(self, name: str, plan: str = "") -> float:
        return float(self.windows(name, plan).mean())

    def losses(self, settings: str, plan: str = "", seeds: int = 3) -> list[float]:
        """One for each seed."""
        return [self.loss(name, plan) for name in seeded(settings, seeds)]

    def noise(self) -> float:
        """How much the loss of one and the same model differs from seed to seed (standard deviation)."""
        self.train(seeded(""))
        return stdev(self.losses(""))


# --- sections of RESULTS.md --------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean and, of several, the standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `header` is its first line, numbers get three digits."""
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for row in rows:
        cells = [f"{x:+.3f}" if isinstance(x, float) else str(x) for x in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def claim(text: str, effects: list[float], noise: float, unit: str = "nats") -> list[str]:
    """A row of the table of claims: `effects`, one a seed, are positive where the claim holds; `noise` is
    what one of them varies by."""
    effect, bound = mean(effects), 2 * noise / len(effects) ** 0.5
    return [text, f"above {bound:.3f}", f"{effect:+.3f} {unit} ({len(effects)})", sign(effect, bound)]


def sign(effect: float, bound: float = 0.0) -> str:
    return "appeared" if effect > bound else "opposite" if effect < -bound else "did not appear"


@contextmanager
def picture(path: Path, columns: int = 1, rows: int = 1, **options):
    """Axes to draw on; the picture is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=(1 + 4 * columns, 3.6 * rows), dpi=120, **options)
    yield axes
    for ax in np.ravel(axes):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def curve(ax, x: Sequence, y: Sequence, i: int, label: str) -> None:
    marker, dash, colour = LOOKS[i % len(LOOKS)]
    ax.plot(x, y, marker=marker, linestyle=dash, color=colour, label=label, markersize=4)


def even_plan(n_layer: int, share: float) -> str:
    """Evenly spread kept layers, as many as the share of the cache allows."""
    return Plan.parse(f"lasagna-bottom:{max(1, round(n_layer * share))}", n_layer).spec


def deployments(n_layer: int, share: float) -> list[str]:
    """Ways to spend a share of the cache: keep both K and V of evenly spread layers, and let the others read
    the nearest below, or its K and V of layer 0; or store V of layer 0 only, and K of more layers."""
    kept = Plan.parse(even_plan(n_layer, share), n_layer)
    bottom_v = [r if r.k == (i,) else Route(r.k, (0,)) for i, r in enumerate(kept.routes)]
    n_keys = max(1, min(n_layer, round(2 * n_layer * share) - 1))
    keys = Plan.parse(f"lasagna-bottom:{n_keys}", n_layer)
    keys_only = [Route(r.k, (0,)) for r in keys.routes]
    return list(dict.fromkeys(p.spec for p in (kept, Plan(tuple(bottom_v)), Plan(tuple(keys_only)))))


def deployed(lab: Lab, name: str, share: float) -> str:
    """The best of the `deployments` that a run's model can have within a share of the cache, on training
    text, so that held-out text is not what chooses."""
    model, _ = lab.load(name)
    fitting = []
    for spec in dict.fromkeys(s for x in BUDGETS if x <= share for s in deployments(lab.n_layer, x)):
        with suppress(PlanError):
            fitting.append(model.resolve(spec).spec)
    return min(fitting, key=lambda spec: lab.windows(name, spec, "train", 16).mean())


BUDGETS = (1, 0.75, 0.5, 0.25, 0.125)
PERCENT = [f"{100 * share:g}%" for share in BUDGETS]


# --- the experiments: each trains what is missing and returns its claims and its text ----------------------

NORMAL, STOCHASTIC = "", "--router_p=0.5"
RULES = {  # of drawing plans: settings, or none for the variation of that name; and what it is
    "the paper's": (STOCHASTIC, "K and V of one lower layer, drawn evenly"),
    "bottom-v": ("", "K of a lower layer, then V of layer 0"),
    "shared-v": ("--plan=shared-v --router_p=0.5", "V of layer 0 for all, always; K own or of a lower layer"),
    "shared-v, p = 0.3": ("--plan=shared-v --router_p=0.3", "`shared-v`, reading lower layers less often"),
    "apart": ("", "K of a lower layer, V of layer 0, each with a chance of its own"),
    "kept": ("", "a random set of layers is kept, from one to all; the others read the nearest below"),
    "kept-bottom-v": ("", "`kept`, but the others read V of layer 0"),
    "alternate": ("", "the paper's rule and the full plan in turn"),
    "alternate-bottom-v": ("", "`bottom-v` and the full plan in turn"),
    "alternate-apart": ("", "`apart` and the full plan in turn"),
    "ramp": ("", "the paper's, p growing from 0 over the first 200 draws"),
    "distilled": ("", "the paper's; the drawn plan learns what the full one predicts, for twice the work"),
    "one plan a sequence": (
        "--router_p=0.5 --batch_size=1 --gradient_accumulation_steps=4",
        "the paper's, drawn for every sequence of a batch",
    ),
}
FINALISTS = ("the paper's", "bottom-v", "shared-v", "shared-v, p = 0.3")  # with three seeds
BEST = "shared-v, p = 0.3"


def rule(name: str) -> str:
    return RULES[name][0] or f"{name} --router_p=0.5"


def seeded(settings: str, seeds: int = 3) -> list[str]:
    return [f"{settings} --seed={seed}".strip() for seed in range(seeds)]


def cache(lab: Lab, pictures: Path) -> tuple[list, str]:
    """Cache against loss: one normal and one stochastic model under many plans, and models for one plan."""
    n, heads = lab.n_layer, 4
    plans = [even_plan(n, share) for share in BUDGETS] + [Plan.parse("yoco", n).spec]
    _, three_quarters, half, quarter, eighth, _ = plans
    flexible = {  # name -> settings, seeds
        "normal": (NORMAL, 3),
        "stochastic, p = 0.5": (STOCHASTIC, 3),
        "stochastic, p = 0.3": ("--router_p=0.3", 1),
        "stochastic, p = 0.7": ("--router_p=0.7", 1),
    }
    dedicated = {  # name -> share of the cache, settings
        "own K, V of layer 0 (`shared-v`)": ((n + 1) / (2 * n), "--plan=shared-v"),
        f"CLA (`{three_quarters}`)": (0.75, f"--plan={three_quarters}"),
        "CLA-2": (0.5, "--plan=cla:2"),
        "YOCO": (0.5, "--plan=yoco"),
        "GQA, half the KV heads": (0.5, f"--n_kv_head={heads // 2}"),
        "FusedKV-Lite": (0.5, "--plan=fusedkv-lite"),
        "FusedKV": (0.5, "--plan=fusedkv"),
        "CLA-4": (0.25, f"--plan={quarter}"),
        "MQA, a quarter of the KV heads": (0.25, f"--n_kv_head={heads // 4}"),
        f"CLA-{n}": (0.125, f"--plan={eighth}"),
    }
    best = f"{rule(BEST)} --seed=0"
    lab.train([name for settings, seeds in flexible.values() for name in seeded(settings, seeds)])
    lab.train([f"{settings} --seed=0" for _, settings in dedicated.values()] + [best])

    model, _ = lab.load("--seed=0")
    full = costs(model.plan, model.config).cache_bytes_per_token  # bf16
    rows, points = [], []

    def point(run: str, plan: str, ratio: float, loss: float) -> None:
        size = {"cache_ratio": ratio, "cache_bytes_per_token": ratio * full}
        points.append({"run": run, "plan": plan, "loss": loss} | size)

    for name, (settings, seeds) in flexible.items():
        losses = [lab.losses(settings, plan, seeds) for plan in plans]
        rows.append([name, *map(spread, losses)])
        for plan, values in zip(plans, losses) if seeds > 1 else ():
            point(name, plan, Plan.parse(plan, n).cache_ratio, mean(values))
    compared = []
    for name, (share, settings) in dedicated.items():
        own = lab.loss(f"{settings} --seed=0")
        papers = lab.loss(f"{STOCHASTIC} --seed=0", even_plan(n, share))
        other = lab.loss(best, deployed(lab, best, share))
        compared.append([name, f"{share:.1%}", f"{own:.3f}", papers - own, other - own])
        kind = (
            "GQA, MQA" if "QA" in name else "CLA, YOCO" if "CLA" in name or name == "YOCO" else "V of layer 0"
        )
        point(f"one plan each: {kind}", name, share, own)
    for share in BUDGETS:
        spec = deployed(lab, best, share)
        point(f"stochastic, {BEST}", spec, Plan.parse(spec, n).cache_ratio, lab.loss(best, spec))
    pictures.mkdir(exist_ok=True)
    draw(points, pictures / "cache.png")

    claims = []
    for plan, share in ((half, "half"), (quarter, "a quarter of")):
        rises = {}
        for settings in (NORMAL, STOCHASTIC):
            at_full, shared = lab.losses(settings), lab.losses(settings, plan)
            rises[settings] = [b - a for a, b in zip(at_full, shared)]
        normal = rises[NORMAL]
        saved = [a - b for a, b in zip(normal, rises[STOCHASTIC])]
        claims.append(claim(f"With {share} the cache a normal model gets worse", normal, stdev(normal)))
        claims.append(claim(f"With {share} the cache a stochastic one loses less", saved, stdev(saved)))
    text = table(f"| loss at a cache of | {' | '.join(PERCENT)} | 50%, lower half |", rows)
    text += """
Evenly spread layers are kept, the others read the nearest below. Mean and standard deviation over three
seeds; p = 0.3 and 0.7 have one.

![loss against cache](PICTURES/cache.png)

What a model trained for one plan alone reaches, and how far above it a stochastic checkpoint is within the
same cache: one trained and deployed by the paper's rule, and one by the rule that is best in the next
section (seed 0).

"""
    header = f"| trained for one plan | cache | loss | stochastic above it | `{BEST}` above it |"
    return claims, text + table(header, compared)


def price(lab: Lab, pictures: Path) -> tuple[list, str]:
    """What flexibility costs at the full cache, and which rule of drawing makes it cheapest."""
    n = lab.n_layer
    studies = {  # what moves -> its values, each with the settings of a normal and a stochastic model
        "p": {p: ("", f"--router_p={p}") for p in (0.3, 0.5, 0.7)},
        "steps": {lab.steps: (NORMAL, STOCHASTIC)},
        "layers": {n: (NORMAL, STOCHASTIC)},
    }
    for what, flag, values in (
        ("steps", "max_iters", (lab.steps // 2, 2 * lab.steps)),
        ("layers", "n_layer", (n // 2, n * 3 // 2)),
    ):
        for value in values:
            studies[what][value] = (f"--{flag}={value}", f"--{flag}={value} {STOCHASTIC}")
    twice = f"--max_iters={2 * lab.steps}"
    shared = rule("shared-v")
    studies["steps, shared-v"] = {lab.steps: (NORMAL, shared), 2 * lab.steps: (twice, f"{twice} {shared}")}
    pairs = [settings for study in studies.values() for pair in study.values() for settings in pair]
    seeds = {name: 3 if name in FINALISTS else 1 for name in RULES}
    lab.train([f"{settings} --seed=0".strip() for settings in pairs])
    lab.train([*seeded(NORMAL), *(run for name in RULES for run in seeded(rule(name), seeds[name]))])

    text = "The price: what a stochastic model loses at the full cache beside a normal one (seed 0).\n"
    with picture(pictures / "price.png", 2) as axes:
        for i, (what, study) in enumerate(studies.items()):
            rows = []
            for value, (normal, stochastic) in sorted(study.items()):
                scarce = even_plan(value if what == "layers" else n, 0.125)
                normal, stochastic = (f"{settings} --seed=0".strip() for settings in (normal, stochastic))
                a, b = lab.loss(normal), lab.loss(stochastic)
                rises = [lab.loss(normal, scarce) - a, lab.loss(stochastic, scarce) - b]
                rows.append([str(value), f"{a:.3f}", f"{b:.3f}", b - a, *rises])
            header = f"| {what} | normal | stochastic | price | normal's rise at 12.5% cache | stochastic's |"
            text += "\n" + table(header, rows)
            base = {"p": 0.5, "layers": n}.get(what, lab.steps)
            x, y = [float(row[0]) / base for row in rows], [row[3] for row in rows]
            curve(axes[0], x, y, i, f"{what}, times {base}")
        axes[0].set_xscale("log", base=2)
        axes[0].set(xlabel="relative size", ylabel="price, nats per token")

        losses, rows = {}, []
        for i, name in enumerate(RULES):
            runs = seeded(rule(name), seeds[name])
            at = [[lab.loss(run, deployed(lab, run, share)) for run in runs] for share in BUDGETS]
            losses[name] = at
            rows.append([f"`{name}`", *map(spread, at), f"{mean(map(mean, at)):.3f}", RULES[name][1]])
            if name in FINALISTS:
                curve(axes[1], PERCENT, [mean(x) for x in at], i, name)
        normal = lab.losses(NORMAL)
        axes[1].axhline(mean(normal), color="black", linewidth=0.8, label="normal, full cache")
        axes[1].set(xlabel="cache at most", ylabel="held-out loss, nats per token")
    text += f"""
Rules of drawing, at p = 0.5 unless named, sorted by the mean over budgets; those with a spread have three
seeds, and a normal model at the full cache has {spread(normal)}. Every model is deployed as suits it best:
of keeping K and V of evenly spread layers, the same with V of layer 0 for the others, and V of layer 0 alone
with K of more layers, the plan with the lowest loss on 16 windows of training text that fits the budget.

"""
    text += table(f"| rule | {' | '.join(PERCENT)} | mean | |", sorted(rows, key=lambda row: row[-2]))
    papers, best = losses["the paper's"], losses[BEST]
    paid = [a - b for a, b in zip(papers[0], normal)]
    gain = [mean(x) - mean(y) for x, y in zip(zip(*papers), zip(*best))]
    claims = [
        claim("The paper's rule has a price at the full cache (first readings: 0.2)", paid, stdev(paid)),
        claim(f"Rule `{BEST}` is better, on average over the budgets", gain, stdev(gain)),
        claim(
            f"Within half the cache rule `{BEST}` is below the normal model's full one",
            [a - b for a, b in zip(normal, best[2])],
            stdev(normal) * 2**0.5,
        ),
    ]
    return claims, text + "\n![the price, and rules of drawing](PICTURES/price.png)\n"


def keys_values(lab: Lab, pictures: Path) -> tuple[list, str]:
    """Which lower layers the upper ones draw on, for K and for V."""
    n, half = lab.n_layer, lab.n_layer // 2
    storage = list(map(str, range(half)))

    def upper(route: str) -> str:
        spec = "_".join(storage + [route] * (n - half))
        named = [s for s in ("yoco", "fusedkv-lite") if Plan.parse(s, n) == Plan.parse(spec, n)]
        return f"--plan={named[0] if named else spec} --seed=0"

    every = "+".join(storage)
    dense = f"even {upper(f'k{every}v{every}')}"
    pairs = {(k, v): upper(f"k{k}v{v}") for k in (0, half - 1) for v in (0, half - 1)}
    lab.train([dense, *pairs.values()])

    model, _ = lab.load(dense)
    shares = {}  # (upper layers, lower layers)
    for which, kind in enumerate("KV"):
        gates = [(block.attn.k_gate, block.attn.v_gate)[which] for block in model.blocks[half:]]
        weight = torch.stack([gate.mean((1, 2, 3)) for gate in gates])
        shares[kind] = (weight / weight.sum(1, keepdim=True)).detach().cpu()
    with picture(pictures / "keys_values.png", 2) as axes:
        for ax, (kind, share) in zip(axes, shares.items()):
            extent = (-0.5, half - 0.5, half - 0.5, n - 0.5)
            ax.imshow(share, cmap="RdBu", vmin=0, vmax=2 / half, origin="lower", extent=extent)
            for (i, j), s in np.ndenumerate(share.numpy()):
                ax.text(j, half + i, f"{s:.1%}", ha="center")
            ax.set(title=f"{kind} of upper layers", xlabel="from lower layer", ylabel="upper layer")
            ax.set(xticks=range(half), yticks=range(half, n))
    low_k, low_v = (shares[kind][:, : half // 2].sum(1).numpy() for kind in "KV")
    tilts = [list(map(float, x)) for x in (low_v - 0.5, low_v - low_k)]
    loss = {pair: lab.loss(name) for pair, name in pairs.items()}
    lite = loss[half - 1, 0]
    lead = min(x for pair, x in loss.items() if pair != (half - 1, 0)) - lite
    noise = 2**0.5 * lab.noise()
    claims = [
        claim(
            "Upper layers draw more than half of V from the bottom layers", tilts[0], stdev(tilts[0]), "of it"
        ),
        claim("and more of V than of K", tilts[1], stdev(tilts[1]), "of it"),
        claim("Middle keys with bottom values beat the other three pairings", [lead], noise),
    ]
    text = f"""A model whose upper layers each learn a weighted sum over the K and V of all lower layers
(`{dense.split()[1]}`),
all weights starting even, trained for {lab.steps} steps. The picture shows the mean of the gates over heads
and features, as a share of the row; blue is more than an even share. In the table of claims each upper layer
counts as one.

![which lower layers the upper ones draw on](PICTURES/keys_values.png)

Then one source each:

"""
    rows = [[f"K of layer {k}, V of layer {v}", f"{x:.3f}"] for (k, v), x in loss.items()]
    return claims, text + table("| upper layers read | loss |", sorted(rows, key=lambda row: row[1]))


def fusion(lab: Lab, pictures: Path) -> tuple[list, str]:
    """FusedKV against the rest, at equal tokens and equal cache."""
    half = lab.n_layer // 2
    methods = {
        "full cache": "", "CLA-2": "--plan=cla:2", "YOCO": "--plan=yoco", "GQA": "--n_kv_head=2",
        "FusedKV-Lite": "--plan=fusedkv-lite", "FusedKV": "--plan=fusedkv",
    }  # fmt: skip
    sizes = {"narrow": lab.small, "middle": ""}
    runs = {
        (m, s): f"{sizes[s]} {methods[m]} --seed=0".replace("  ", " ").strip() for m in methods for s in sizes
    }
    gates = {
        "tied by RoPE (FusedKV)": "--plan=fusedkv --seed=0",
        "untied": "untied --plan=fusedkv --seed=0",
        "untied, fused before RoPE": "before-rope --plan=fusedkv --seed=0",
        "tied, starting even": "even --plan=fusedkv --seed=0",
    }
    lab.train([*runs.values(), *gates.values()])

    loss = {key: lab.loss(name) for key, name in runs.items()}
    rows = []
    for m in methods:
        cells = [f"{loss[m, s]:.3f} ({loss[m, s] - loss['full cache', s]:+.3f})" for s in sizes]
        rows.append([m, "100%" if m == "full cache" else "50%", *cells])
    params = [sum(p.numel() for p in lab.load(runs["full cache", s])[0].parameters()) for s in sizes]
    noise = 2**0.5 * lab.noise()
    claims = []
    better = [("FusedKV", "full cache"), ("FusedKV-Lite", "full cache"), ("FusedKV", "FusedKV-Lite")]
    for a, b in better + [("FusedKV-Lite", other) for other in ("CLA-2", "YOCO", "GQA")]:
        claims.append(
            claim(f"{a} is better than {b} (two sizes)", [loss[b, s] - loss[a, s] for s in sizes], noise)
        )
    tied, untied, before, even = map(lab.loss, gates.values())
    claims.append(claim("Gates tied by RoPE are better than untied ones", [untied - tied], noise))
    claims.append(claim("Fusing after RoPE is better than before", [before - tied], noise))
    claims.append(claim("Gates that start as FusedKV-Lite are better than even ones", [even - tied], noise))
    with picture(pictures / "fusion.png", 2) as axes:
        for ax, s in zip(axes, sizes):
            _, full = lab.log(runs["full cache", s], "train_loss")  # all see the same batches
            for i, m in enumerate(methods):
                steps, values = lab.log(runs[m, s], "train_loss")
                smooth = np.convolve(np.subtract(values, full), np.ones(3) / 3, "valid")
                curve(ax, steps[1:-1], smooth, i, m)
            ax.set(title=f"{s} model", xlabel="step")
        axes[0].set_ylabel("training loss above the full cache's")
    model, _ = lab.load(gates["tied by RoPE (FusedKV)"])
    with picture(pictures / "gates.png", 4) as axes:
        for ax, (which, m) in zip(axes, np.ndindex(2, 2)):
            stack = [(b.attn.k_gate, b.attn.v_gate)[which][m].flatten() for b in model.blocks[half:]]
            gate = torch.stack(stack).detach().cpu()
            look = {"cmap": "RdBu", "vmin": -1.5, "vmax": 1.5, "aspect": "auto", "interpolation": "nearest"}
            extent = (0, gate.size(1), n_low := half - 0.5, n_low + lab.n_layer - half)
            ax.figure.colorbar(ax.imshow(gate, origin="lower", extent=extent, **look), ax=ax)
            features = ("RoPE pairs", "features")[which]
            ax.set(title=f"{'KV'[which]} from layer {(0, half - 1)[m]}", xlabel=f"KV heads x {features}")
            ax.set(yticks=range(half, lab.n_layer))
        axes[0].set_ylabel("layer")
    text = "Loss (seed 0), and in brackets how far above the full cache's of the same size.\n\n"
    header = " | ".join(f"{s}, {human(p)} parameters" for s, p in zip(sizes, params))
    text += table(f"| | cache | {header} |", rows)
    text += "\n![loss curves](PICTURES/fusion.png)\n\nHow FusedKV's key gates are bound:\n\n"
    text += table("| gates | loss |", [[name, f"{lab.loss(run):.3f}"] for name, run in gates.items()])
    text += (
        f"\nGates after training; K from layer {half - 1} and V from layer 0 start at 1, the others at 0.\n"
    )
    return claims, text + "\n![gates](PICTURES/gates.png)\n"


def regulariser(lab: Lab, pictures: Path) -> tuple[list, str]:
    """Stochastic routing when data is short: many epochs over a small corpus."""
    shorten("python", "python-short", SHORT)
    often = f"--dataset=python-short --eval_interval={lab.steps // 12}"
    runs = {
        (size, trained): f"{width} {often} {settings} --seed=0".replace("  ", " ")
        for size, width in (("narrow", lab.small), ("wide", lab.large))
        for trained, settings in (("normal", NORMAL), ("stochastic", STOCHASTIC))
    }
    lab.train(runs.values())
    curves = {key: lab.log(name, "val_loss") for key, name in runs.items()}
    with picture(pictures / "regulariser.png", 2, sharey=True) as axes:
        for ax, size in zip(axes, ("narrow", "wide")):
            for i, trained in enumerate(("normal", "stochastic")):
                steps, values = curves[size, trained]
                curve(ax, steps[1:], values[1:], i, trained)
            ax.set(title=f"{size} model", xlabel="step")
        axes[0].set_ylabel("held-out loss, full cache")
    noise, claims = 2**0.5 * lab.noise(), []
    for size in ("narrow", "wide"):
        normal, stochastic = (curves[size, trained][1] for trained in ("normal", "stochastic"))
        lowest, last = [min(normal) - min(stochastic)], [normal[-1] - stochastic[-1]]
        claims.append(claim(f"On short data routing helps the {size} model: lowest loss", lowest, noise))
        claims.append(claim(f"On short data routing helps the {size} model: loss at the end", last, noise))
    epochs = lab.steps * lab.tokens_per_step / SHORT
    text = f"{SHORT:,} tokens, read {epochs:.1f} times; held-out text as elsewhere, 32 windows (seed 0).\n\n"
    rows = [[size, trained, f"{min(v):.3f}", f"{v[-1]:.3f}"] for (size, trained), (_, v) in curves.items()]
    text += table("| model | trained | lowest loss | at the end |", rows)
    return claims, text + "\n![held-out loss over training](PICTURES/regulariser.png)\n"


SHORT = 1 << 15  # tokens


def shorten(name: str, short: str, tokens: int) -> None:
    """data/SHORT: the first tokens of data/NAME's training text, and all its held-out text."""
    source, folder = Path("data") / name, Path("data") / short
    if not source.exists():
        data.prepare_dataset(name, source)
    ids, enc = data.Tokens(source, "train", 256).ids[:tokens], data.load_tokenizer(source)
    folder.mkdir(exist_ok=True)
    replace_file(folder / "train.bin", ids.tobytes())
    for file in ("val.bin", "tokenizer.tiktoken"):
        replace_file(folder / file, (source / file).read_bytes())
    n_bytes = sum(len(data.token_bytes(enc, int(i))) for i in ids)
    counts = {"tokens": tokens, "bytes": n_bytes, "sha256": sha256(folder / "train.bin")}
    meta = data.read_meta(source) | {"source": f"the first {tokens} tokens of {name}", "train": counts}
    replace_file(folder / "meta.json", json.dumps(sealed(meta)).encode())


NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]


def framework(lab: Lab, pictures: Path) -> tuple[list, str]:
    """The nine configurations at half and a quarter of the cache: quality and speed."""
    n, steps = lab.n_layer, lab.steps * 4 // 3
    length = f"--max_iters={steps} --warmup_iters={steps // 10} --eval_interval={steps}"
    shrink = {"full": 1} | {f"{name}:{n // x}": x for x in (2, 4) for name in NINE}
    first = {}  # plan -> the first configuration that means it: some are one and the same
    for spec in shrink:
        first.setdefault(Plan.parse(spec, n), spec)
    runs = {
        spec: f"--n_kv_head=2 --optimizer=adamw {length} --plan={spec} --seed=0" for spec in first.values()
    }
    lab.train(runs.values())
    path = lab.path(runs["full"]) / "times.json"
    if not path.exists():
        replace_file(path, json.dumps(measure_times(lab, runs)).encode())
    times = json.loads(path.read_text())

    rows, loss = [], {}
    full, full_rate = lab.windows(runs["full"], n=128), 1e3 / times["full"][2]
    for spec, x in shrink.items():
        plan = Plan.parse(spec, n)
        same = first[plan]
        own, (step, ttft, tpot) = lab.windows(runs[same], n=128), times[same]
        loss[spec] = float(own.mean())
        above = f"{(own - full).mean():+.3f} ± {stderr(own - full):.3f}" if x > 1 else ""
        note = ("cyclic" if plan.cyclic else "") if same == spec else f"the same plan as `{same}`"
        row = [f"`{spec}`", f"{plan.cache_ratio:.0%}", f"{loss[spec]:.3f}", above]
        rows.append([*row, f"{step:.0f} ms", f"{ttft:.0f} ms", f"{1e3 / tpot:.0f}/s", note])
    with picture(pictures / "framework.png", 2, sharey=True) as axes:
        columns = [("held-out loss, nats per token", loss)]
        columns.append(("training step, ms", {spec: times[first[Plan.parse(spec, n)]][0] for spec in shrink}))
        for ax, (label, values) in zip(axes, columns):
            for x, marker, fill in ((2, "o", "black"), (4, "s", "white")):
                points = [values[f"{name}:{n // x}"] for name in NINE]
                ax.plot(points, range(9), marker, mec="black", mfc=fill, label=f"cache {x}x smaller")
            ax.axvline(values["full"], color="black", linestyle="--", linewidth=1, label="full cache")
            ax.set_xlabel(label)
        axes[0].set_yticks(range(9), NINE)
        axes[0].invert_yaxis()

    noise = 2**0.5 * lab.noise()
    lead = [loss["full"] - loss[f"{name}:{n // 2}"] for name in NINE]
    claims = [
        claim(
            f"Half the cache: {sum(x > 0 for x in lead)} of nine beat the full model; the best",
            [max(lead)],
            noise,
        )
    ]
    for kind in ("pizza", "sandwich", "lasagna"):
        bottom, *others = (loss[f"{kind}-{target}:{n // 4}"] for target in ("bottom", "middle", "top"))
        claims.append(
            claim(f"A quarter: {kind} is best with middle or top targets", [bottom - min(others)], noise)
        )
    faster = median(1e3 / times[first[Plan.parse(spec, n)]][2] / full_rate - 1 for spec in shrink)
    claims.append(
        ["Smaller caches decode faster", "above 0", f"{faster:+.0%} tokens/s (median)", sign(faster)]
    )
    text = f"""One seed, {steps} AdamW steps, two KV heads. Above full: paired over 128 held-out windows,
with the standard error over windows, which says nothing of other seeds. Times are medians of {TURNS} repeats,
all models taking turns: forward and backward of one batch, first token of a prompt of 192 tokens, greedy
decoding of 32 more.

"""
    header = "| plan | cache | loss | above full | training step | first token | decode | |"
    return claims, text + table(header, rows) + "\n![loss and training time](PICTURES/framework.png)\n"


TURNS = 7


def measure_times(lab: Lab, runs: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of a training step, the first token and a further one, of models that take turns."""
    models = {spec: lab.load(name)[0] for spec, name in runs.items()}
    device = models["full"].embed.weight.device
    x, y = (t.to(device) for t in next(lab.tokens(runs["full"]).held_out(4, 4)))

    def measure(model: GPT) -> list[float]:
        times = [time.perf_counter()]
        model(x, y)[1].backward()
        float(model.embed.weight.grad[0, 0])  # waits for a GPU
        times.append(time.perf_counter())
        for token in model.stream(x[:1, :192], 33, temperature=0):
            token.item()
            times.append(time.perf_counter())
        step, ttft = np.diff(times)[:2]
        return [1e3 * t for t in (step, ttft, (times[-1] - times[2]) / 32)]

    turns = [{spec: measure(model) for spec, model in models.items()} for _ in range(1 + TURNS)][1:]
    return {spec: np.median([turn[spec] for turn in turns], axis=0).tolist() for spec in models}


@torch.no_grad()
def continuations(lab: Lab, name: str, plan: str, n: int = 256) -> np.ndarray:
    """HellaSwag's form: 96 tokens of held-out text, and its true next 32 against three pieces from elsewhere.
    Right (1) where the true one has the highest likelihood per token; all have the same number."""

    def measure():
        model, _ = lab.load(name)
        text = torch.cat([x for x, _ in lab.tokens(name).held_out(n, 16)])[:, :128]
        for i, row in enumerate(text):
            others = text[[(i + len(text) * k // 4) % len(text) for k in (1, 2, 3)], 96:]
            ends = torch.cat((row[None, 96:], others))
            rows = torch.cat((row[:96].expand(4, -1), ends), dim=1).to(model.embed.weight.device)
            loss = model.losses(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), plan)[:, 95:]
            yield loss.mean(1).argmin() == 0

    return lab.cached(name, f"continuations {plan} {n}", measure)


@torch.no_grad()
def recall(lab: Lab, name: str, plan: str, distance: int, n: int = 256) -> np.ndarray:
    """Four keys, each followed by its value (tokens drawn among the commoner ones), then `distance` tokens of
    held-out text, then one of the keys. Right (1) where its value is likelier than the other three."""

    def measure():
        model, _ = lab.load(name)
        common = np.bincount(lab.tokens(name, "train").ids).argsort()[::-1][50:1050]
        rng = np.random.default_rng(distance)
        for row in torch.cat([x for x, _ in lab.tokens(name).held_out(n, 16)]):
            pairs = torch.from_numpy(rng.choice(common, 8, replace=False))
            asked = rng.integers(4)
            idx = torch.cat((row[:32], pairs, row[32 : 32 + distance], pairs[2 * asked, None]))
            logits = model(idx[None].to(model.embed.weight.device), plan=plan)[0][0, -1].cpu()
            yield logits[pairs[1::2]].argmax() == asked

    return lab.cached(name, f"recall {plan} {distance} {n}", measure)


def downstream(lab: Lab, pictures: Path) -> tuple[list, str]:
    """Accuracy by plan: multiple choice of continuations, and recall at growing distance."""
    longer = f"--max_iters={2 * lab.steps}"  # shorter runs recall nothing
    models = {  # name -> its run, and which of the deployments it takes
        "normal": (f"{longer} --seed=0", 0),
        "stochastic": (f"{longer} {STOCHASTIC} --seed=0", 0),
        "stochastic, shared-v": (f"{longer} --plan=shared-v --router_p=0.5 --seed=0", -1),
    }
    lab.train([name for name, _ in models.values()])
    shares = {f"{share:.0%}": share for share in (1, 0.5, 0.25)}
    distances = ("4", "16", "64", "192")
    right = {}  # one for each question
    for m, (name, which) in models.items():
        for percent, share in shares.items():
            plan = deployments(lab.n_layer, share)[which]
            right[m, percent, "continuations"] = continuations(lab, name, plan)
            for d in distances:
                right[m, percent, f"recall over {d}"] = recall(lab, name, plan, int(d))
    tasks = ["continuations", *(f"recall over {d}" for d in distances)]
    rows = [[m, p, *(f"{right[m, p, task].mean():.3f}" for task in tasks)] for m in models for p in shares]
    with picture(pictures / "recall.png", len(models), sharey=True) as axes:
        for ax, m in zip(axes, models):
            for i, percent in enumerate(shares):
                values = [right[m, percent, task].mean() for task in tasks[1:]]
                curve(ax, distances, values, i, f"{percent} of the cache")
            ax.axhline(0.25, color="black", linewidth=0.8)
            ax.set(title=m, xlabel="tokens between value and question")
        axes[0].set_ylabel("accuracy of recall")
    claims = []
    for title, these in (("continuations", tasks[:1]), ("recall, all distances", tasks[1:])):
        lost = {
            m: np.concatenate([right[m, "100%", task] - right[m, "25%", task] for task in these])
            for m in models
        }
        for text, x in (
            (f"A quarter of the cache hurts: {title}", lost["normal"]),
            (f"and a stochastic model less: {title}", lost["normal"] - lost["stochastic"]),
        ):
            claims.append(claim(text, [float(x.mean())], stderr(x), "accuracy"))
    n = len(right["normal", "100%", "continuations"])
    error = f"{0.5 / n**0.5:.3f}"
    text = f"""Runs of {2 * lab.steps} steps, one seed, {n} questions; chance is 0.25, and an accuracy's
standard error {error} at most. Continuations: 96 tokens of held-out text, the true next 32 against three
pieces from elsewhere. Recall: four pairs of tokens, then so many tokens of held-out text, then the first
token of one pair: is its second likelier than the other three? `shared-v` takes 56% of the cache for 100%.

"""
    text += table(f"| | cache | {' | '.join(tasks)} |", rows)
    return claims, text + "\n![accuracy of recall](PICTURES/recall.png)\n"


# --- RESULTS.md --------------------------------------------------------------------------------------------

EXPERIMENTS = {
    "cache": (cache, "Cache against loss"),
    "price": (price, "The price of flexibility"),
    "keys_values": (keys_values, "Keys and values are not alike"),
    "fusion": (fusion, "FusedKV against the rest"),
    "regulariser": (regulariser, "A regulariser when data is short"),
    "framework": (framework, "The nine configurations"),
    "downstream": (downstream, "Accuracy by plan"),
}


def provenance(lab: Lab) -> str:
    """Where the numbers of a section come from."""
    names = dict.fromkeys(lab.used)
    runs = [json.loads((lab.path(name) / "run.json").read_text()) for name in names]
    spent = duration(sum(lab.log(name, "time")[1][-1] for name in names))
    commit, device, dtype, version, python = (
        ", ".join(sorted({str(r[key]) for r in runs}))
        for key in ("commit", "device", "dtype", "torch", "python")
    )
    text = f"{len(runs)} runs of {spent} in all, beside each other; commit {commit}; {device}, "
    return text + f"{dtype.replace('torch.', '')}, torch {version}, Python {python}."


def write_results(lab: Lab, path: Path) -> None:
    """RESULTS.md from the sections that are there."""
    parts = {name: lab.folder / f"{name}.json" for name in EXPERIMENTS}
    parts = {name: json.loads(part.read_text()) for name, part in parts.items() if part.exists()}
    flags = "" if lab.name == "cpu" else f" --set {lab.name}"
    text = f"""# Results

Written by `python experiments.py all{flags}` from the logs of its runs; no number is typed by hand. Every
run is `python train.py {" ".join(lab.base)}` on the default corpus, with what its table names set
otherwise. Losses are nats per token on 64 held-out windows. These models are far smaller than the papers'
and trained for minutes: what appears here is the direction of an effect, not its size.

A claim's effect is positive where the claim holds; in brackets, how many runs it is the mean of. It
*appeared* if it is larger than what stands under "expected", twice its standard error (over seeds; for
single runs, that of three normal models), is *opposite* if it is as far below zero, and else *did not
appear* at this size.

"""
    rows, sections = [], ""
    for name, part in parts.items():
        title = EXPERIMENTS[name][1]
        rows += [[f"[{title}](#{title.lower().replace(' ', '-')})", *row] for row in part["claims"]]
        sections += (
            f"\n## {title}\n\n`python experiments.py {name}{flags}`: {part['provenance']}\n\n{part['text']}"
        )
    text += table("| | claim | expected | measured | verdict |", rows) + sections
    replace_file(path, text.replace("PICTURES", lab.pictures.name).encode())
    print(f"wrote {path}")


SETS = {
    "cpu": Lab(
        "cpu",
        Path("out/experiments"),
        "config/demo.toml --n_kv_head=4 --max_iters=300 --warmup_iters=30 --eval_interval=100 "
        "--eval_iters=8".split(),
        small="--n_embd=64", large="--n_embd=192", n_layer=8, steps=300, jobs=os.cpu_count() or 1,
    ),
    "gpu": Lab(
        "gpu",
        Path("out/experiments-gpu"),
        "config/demo.toml --n_embd=256 --n_kv_head=4 --batch_size=64 --max_iters=600 --warmup_iters=60 "
        "--eval_interval=200 --eval_iters=2".split(),
        small="--n_embd=128", large="--n_embd=512", n_layer=8, steps=600, jobs=1,
    ),
}  # fmt: skip


def main():
    if sys.argv[1:2] == ["train"]:
        name = sys.argv[2] if len(sys.argv) > 2 else ""
        if name not in VARIANTS:
            raise UserError(f"no variation {name!r}; valid are {', '.join(VARIANTS)}")
        del sys.argv[1:3]
        with varied(name):
            train.main()
        return
    parser = Parser(__doc__)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"], help="which one to run")
    parser.add_argument(
        "--set", default="cpu", choices=SETS, help="sizes for hours on two cores, or for one GPU [cpu]"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time [cpu: one a core; gpu: one]")
    args = parser.parse_args()
    lab = SETS[args.set]
    lab.jobs = lab.jobs if args.jobs is None else args.jobs
    if lab.jobs < 1:
        raise UserError(f"--jobs {lab.jobs} is not valid; it must be 1 or more")
    for name in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        experiment, title = EXPERIMENTS[name]
        print(f"--- {title}", flush=True)
        lab.used.clear()
        claims, text = experiment(lab, lab.pictures)
        section = {"claims": claims, "text": text, "provenance": provenance(lab)}
        replace_file(lab.folder / f"{name}.json", json.dumps(section).encode())
        print(table("| claim | expected | measured | verdict |", claims), flush=True)
    write_results(lab, Path("RESULTS.md" if lab.name == "cpu" else f"RESULTS_{lab.name.upper()}.md"))


if __name__ == "__main__":
    run(main)
