"""Speed and memory of training steps: a normal model, stochastic routing, FusedKV and a cyclic plan, taking
turns step by step (`python -m lab.bench --train`)."""

import statistics
from itertools import accumulate
from pathlib import Path

import torch

import kernels
from cli import Progress, UserError, human, read_toml, table, write_lines
from costs import costs
from devices import autocast, matmul_peak
from kv_router import StochasticRouter
from lab.clock import Clock
from model import GPT
from settings import TrainConfig
from train import make_optimizer

WARM_UP = 4  # steps of each, which compile


def peak_memory(step, device: str) -> int:
    """Bytes that a training step allocates beyond what was there before it, at its highest."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


class Training:
    """One way to train a model, a step at a time."""

    def __init__(
        self, c: TrainConfig, router: StochasticRouter | None, vocab_size: int, device, dtype, compiled
    ):
        torch.manual_seed(0)
        self.model = GPT(c.model_config(vocab_size)).to(device)
        if compiled:
            kernels.compile_training(self.model)
        self.optimizer = make_optimizer(self.model, c, dtype)
        self.router, self.clip = router, c.grad_clip or float("inf")
        self.context = lambda: autocast(device, dtype)
        self.idx = torch.randint(vocab_size, (c.batch_size, c.block_size), device=device)
        self.flops = costs(self.model.plan, self.model.config, c.block_size).train_flops * c.batch_size

    def step(self, n: int) -> None:
        with self.context():
            plan = self.router.plan(n) if self.router else None
            loss = self.model(self.idx, self.idx, plan=plan)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(args, device: str, dtype: torch.dtype, about: dict) -> None:
    """Print the table, and write out/bench/bench_train.jsonl."""
    sizes = read_toml(args.config, TrainConfig) if args.config else {}
    names = ("n_layer", "n_head", "n_kv_head", "n_embd")
    sizes |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sizes |= {"optimizer": args.optimizer} if args.optimizer else {}
    vocab_size = args.vocab_size or 4096
    base = TrainConfig(**sizes)
    if base.n_layer < 2:
        raise UserError("--train compares plans of two halves; --n_layer must be 2 or more")
    router = StochasticRouter(base.n_layer, 0.5)
    plans = {"normal": "full", "stochastic p=0.5": "full", "fusedkv": "fusedkv"}
    plans[f"cyclic, {base.forward_passes} + {base.backward_passes}"] = f"sandwich-top:{base.n_layer // 2}"
    ways = {}
    for name, plan in plans.items():
        c = TrainConfig(**sizes | {"plan": plan})
        drawn = router if name.startswith("stochastic") else None
        ways[name] = Training(c, drawn, vocab_size, device, dtype, about["compile"])
    seconds = {name: [] for name in ways}
    progress = Progress("training", (WARM_UP + args.repeats) * len(ways))
    for turn in range(WARM_UP + args.repeats):
        for i, (name, way) in enumerate(ways.items()):
            clock = Clock(device)
            clock.mark()
            way.step(turn)
            clock.mark()
            if turn >= WARM_UP:
                seconds[name] += clock.seconds()
            progress(turn * len(ways) + i + 1, name)
    peak, rows = matmul_peak(device, dtype), []
    for name, way in ways.items():
        second, tokens = statistics.median(seconds[name]), way.idx.numel()
        row = {"name": name, "plan": plans[name], "tokens_per_s": tokens / second}
        row |= {"flops_per_s": way.flops / second, "of_peak": way.flops / second / peak}
        row |= {"peak_memory": peak_memory(lambda way=way: way.step(0), device), "optimizer": base.optimizer}
        rows.append(row | {"batch": base.batch_size, "block_size": base.block_size})
    compiled = "compiled" if about["compile"] else "not compiled"
    print(f"{about['device']}, {about['dtype']}, {base.optimizer}, {compiled}")
    print(training_table(rows))
    folder = Path("out/bench")
    folder.mkdir(parents=True, exist_ok=True)
    write_lines([about | row for row in rows], folder / "bench_train.jsonl")
    print(f"wrote {folder}/bench_train.jsonl")


def training_table(rows: list[dict]) -> str:
    lines = [["", "tokens/s", "ratio", "FLOP/s", "of matmul peak", "peak memory"]]
    for row in rows:
        cells = [row["name"], f"{row['tokens_per_s']:,.0f}"]
        cells += [f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}", human(row["flops_per_s"])]
        lines.append(cells + [f"{row['of_peak']:.0%}", human(row["peak_memory"], "B")])
    return table(lines)
