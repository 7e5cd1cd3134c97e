"""Speed and memory of training steps: a normal model, stochastic routing, FusedKV and a cyclic plan, taking
turns step by step (`python -m lab.bench --train`)."""

import time
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import kernels
from kv_router import StochasticRouter
from model import GPT
from support.cli import UserError, human, read_toml, table, write_lines
from support.costs import costs
from support.devices import autocast, data_sheet_peak, matmul_peak
from train import TrainConfig, make_optimizers, take_step

import torch

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
    # A running sum of what is allocated and freed; its highest point is the peak.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(args, device: str, dtype: torch.dtype, about: dict, path: Path, take_turns) -> None:
    """Print the table of training speeds, and write it to `path`."""
    sizes = read_toml(args.config, TrainConfig) if args.config else {}
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "optimizer")
    sizes |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sizes |= {"gradient_accumulation_steps": 1}
    vocab_size, base = args.vocab_size or 4096, TrainConfig(**sizes)
    if base.n_layer < 2:
        raise UserError("--train compares plans of two halves; --n_layer must be 2 or more")
    plans = {"normal": "full", "stochastic p=0.5": "full", "fusedkv": "fusedkv"}
    plans[f"cyclic, {base.forward_passes} + {base.backward_passes}"] = f"sandwich-top:{base.n_layer // 2}"
    # Speed does not depend on the text, so there is none.
    idx = torch.randint(vocab_size, (base.batch_size, base.block_size))
    tokens = SimpleNamespace(batch=lambda *_: (idx, idx))  # in place of a corpus
    steps, rows = {}, []
    for name, plan in plans.items():
        torch.manual_seed(0)
        c = TrainConfig(**sizes | {"plan": plan})
        model = GPT(c.model_config(vocab_size)).to(device)
        if about["compile"]:
            kernels.compile_training(model)
        router = StochasticRouter(base.n_layer, 0.5) if name.startswith("stochastic") else None
        optimizers, context = make_optimizers(model, c, dtype), partial(autocast, device, dtype)
        steps[name] = partial(take_step, 0, c, model, router, optimizers, tokens, context, device)
        flops = costs(model.plan, model.config, c.block_size).train_flops * c.batch_size
        rows.append(about | {"name": name, "plan": plan, "flops": flops, "optimizer": c.optimizer})
        for _ in range(WARM_UP):
            steps[name]()

    def timed(step) -> float:
        began = time.perf_counter()
        float(step()[0])  # waits for a GPU
        return time.perf_counter() - began

    seconds = take_turns({(name,): partial(timed, step) for name, step in steps.items()}, args.repeats)
    # Two yardsticks: what this machine multiplies at best, and what its data sheet claims.
    peak, sheet = matmul_peak(device, dtype), data_sheet_peak(device)
    lines = [["", "tokens/s", "ratio", "FLOP/s", "of matmul peak", "of data sheet", "peak memory"]]
    for row in rows:
        second = median(seconds[row["name"],])
        row |= {"tokens_per_s": idx.numel() / second, "flops_per_s": row["flops"] / second}
        row |= {"of_peak": row["flops_per_s"] / peak, "peak_memory": peak_memory(steps[row["name"]], device)}
        cells = [row["name"], f"{row['tokens_per_s']:,.0f}"]
        cells += [f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}", human(row["flops_per_s"])]
        of_sheet = f"{row['flops_per_s'] / sheet:.0%}" if sheet else ""
        lines.append(cells + [f"{row['of_peak']:.0%}", of_sheet, human(row["peak_memory"], "B")])
    compiled = "compiled" if about["compile"] else "not compiled"
    print(f"{about['device']}, {about['dtype']}, {base.optimizer}, {compiled}")
    print(table(lines))
    write_lines(rows, path)
    print(f"wrote {path}")
