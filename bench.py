"""Time to first token, time per token, throughput and cache memory by plan, side by side, each beside what
`kv_router.costs` predicts. The plans take turns, so that a noisy machine is as noisy to all of them; figures
are medians over the turns.

python bench.py                                                # 125M parameters, random weights
python bench.py --dtype bfloat16 --peer hf --prompts 64 8192   # transformers' model beside ours
python bench.py --out_dir out/stochastic --plans full cla:2 auto:0.25 --prompts 64 192
python bench.py --train --batch 4 --n_layer 8 --n_head 4 --n_kv_head 2 --n_embd 128 --vocab_size 4096
"""

import io
import statistics
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

import hf
import kernels
from cli import Parser, Progress, UserError, duration, replace_file, run
from kv_router import PlanError, StochasticRouter, costs, human
from model import GPT, GPTConfig, KVCache, convert
from sweep import LOOKS, auto_plan, write_lines
from train import (
    TrainConfig,
    autocast,
    device_memory,
    load_run,
    make_optimizer,
    matmul_peak,
    pick_device,
    pick_dtype,
)

SHAPE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "n_embd": 768, "vocab_size": 32000}  # 125M parameters
PLANS = ["full", "yoco", "fusedkv", "fusedkv-lite", "cla:4"]


class Clock:
    """Marks moments, and tells the seconds between them once all are past; by CUDA events on a GPU, so that
    the clock itself does not make it wait."""

    def __init__(self, device: str):
        self.cuda, self.marks = device.startswith("cuda"), []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def steps(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


class Ours:
    """A model under a plan, to be timed."""

    def __init__(self, model: GPT, spec: str):
        try:
            self.plan = model.resolve(spec)
        except PlanError:  # it lacks gates: a copy that has them takes as long as a trained one
            model = convert(model, spec)
            self.plan = model.plan
        self.model, self.name, self.caches = model, spec, {}

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache; one memory for every use, as CUDA graphs need it."""
        weight = self.model.embed.weight
        if (batch, length) not in self.caches:
            config = self.model.config
            self.caches[batch, length] = KVCache(
                config, self.plan, batch, length, weight.dtype, weight.device
            )
        cache = self.caches[batch, length]
        cache.length = 0
        return cache

    def tokens(self, idx: Tensor, n: int, cache: KVCache):
        yield from self.model.stream(idx, n, temperature=0, cache=cache)


class HuggingFace:
    """transformers' own model with the same weights, handed over in memory."""

    def __init__(self, model: GPT):
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as e:
            raise UserError("--peer hf needs the package transformers: pip install transformers") from e
        config, weights = hf.export(model)
        config = AutoConfig.for_model(**config)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=model.embed.weight.dtype)
        self.model.load_state_dict(weights, assign=True)
        with model.embed.weight.device:  # the table of angles is not part of the weights
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        self.model.eval()
        self.name, self.plan = "transformers", model.plan

    def cache(self, batch: int, length: int) -> dict:
        return {"past_key_values": None}

    @torch.no_grad()
    def tokens(self, idx: Tensor, n: int, cache: dict):
        for _ in range(n):
            out = self.model(idx, use_cache=True, logits_to_keep=1, **cache)
            cache["past_key_values"] = out.past_key_values
            idx = out.logits[:, -1].argmax(-1, keepdim=True)
            yield idx


def time_tokens(contender, idx: Tensor, n: int, cache) -> list[float]:
    """Seconds until the first token, and then of each further one, of n in all."""
    clock = Clock(str(idx.device))
    if clock.cuda:
        torch.cuda.synchronize()
    clock.mark()
    for _ in contender.tokens(idx, n, cache):
        clock.mark()
    return clock.steps()


def bandwidth(x: Tensor) -> float:
    """Bytes per second at which this device reads a large tensor; the best of three, to be fair to it."""
    clock = Clock(str(x.device))
    for _ in range(4):
        clock.mark()
        x.sum()
    return x.nbytes / min(clock.steps())


def largest_batch(contender: Ours, context: int, memory: float) -> int:
    """How many sequences of `context` tokens the cache holds in `memory` bytes."""
    positions = max(2, -(-context // kernels.BLOCK)) * kernels.BLOCK
    weight = contender.model.embed.weight
    predicted = costs(contender.plan, contender.model.config, bytes_per_value=weight.itemsize)
    need = positions * predicted.cache_bytes_per_token
    if need > memory:
        raise UserError(
            f"--memory_gb {memory / 1e9:g}: the cache of one sequence of {context} tokens under "
            f"{contender.name} needs {human(need, 'B')}, and there are {human(memory, 'B')}; ask for "
            "more, or for shorter --prompts"
        )
    return int(memory // need)


def interleaved(contenders: list, prompts: list[int], args) -> list[dict]:
    """One row per contender and prompt length: medians over args.repeats turns. Each turn also measures the
    memory's bandwidth, once before each contender."""
    base = contenders[0].model
    device, generator = base.embed.weight.device, torch.Generator().manual_seed(0)
    big = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    idx = torch.randint(base.config.vocab_size, (args.batch, max(prompts)), generator=generator).to(device)
    times, speeds, cache_bytes = {}, [], {}
    progress, done = Progress("measuring", args.repeats * len(contenders) * sum(prompts)), 0
    for turn in range(
        -1, args.repeats
    ):  # the first turn compiles and warms up; long prompts add nothing to it
        for length in prompts if turn >= 0 or device.type == "cuda" else prompts[:1]:
            for contender in contenders:
                cache = contender.cache(args.batch, length + args.new_tokens)
                speed = bandwidth(big)
                steps = time_tokens(contender, idx[:, :length], args.new_tokens, cache)
                if turn >= 0:
                    speeds.append(speed)
                    times.setdefault((contender.name, length), []).append(steps)
                    cache_bytes[contender.name, length] = getattr(cache, "bytes", None)
                    done += length
                    progress(done, f"{contender.name}, {length} tokens")
    progress.close()
    speed = statistics.median(speeds)
    rows = []
    for length in prompts:
        for contender in contenders:
            value_bytes = base.embed.weight.itemsize
            predicted = costs(contender.plan, base.config, length, args.batch, value_bytes)
            turns = times[contender.name, length]
            tpot = statistics.median(statistics.median(steps[1:]) for steps in turns)
            rows.append(
                {
                    "name": contender.name,
                    "plan": contender.plan.spec,
                    "prompt": length,
                    "batch": args.batch,
                    "ttft": statistics.median(steps[0] for steps in turns),
                    "tpot": tpot,
                    "cache_bytes": cache_bytes[contender.name, length],
                    "bandwidth": speed,
                    "of_bandwidth": predicted.decode_bytes / tpot / speed,
                    "predicted": asdict(predicted),
                }
            )
    return rows


def at_capacity(plans: list[Ours], batches: dict[str, int], context: int, args) -> list[dict]:
    """Decode throughput with the given (the largest) batches, their caches filled with `context` tokens."""
    times = {c.name: [] for c in plans}
    progress = Progress("at capacity", (args.repeats + 1) * len(plans))
    for turn in range(-1, args.repeats):
        for i, contender in enumerate(plans):
            cache = contender.cache(batches[contender.name], context)
            for store in (*cache.k.values(), *cache.v.values()):
                store.fill_(0.01)  # memory that no one wrote is not really read
            cache.length = context - args.new_tokens
            idx = torch.zeros(batches[contender.name], 1, dtype=torch.long, device=store.device)
            steps = time_tokens(contender, idx, args.new_tokens, cache)
            if turn >= 0:
                times[contender.name].append(statistics.median(steps[1:]))
            contender.caches.clear()
            progress((turn + 1) * len(plans) + i + 1, contender.name)
    rows = []
    for contender in plans:
        batch, step = batches[contender.name], statistics.median(times[contender.name])
        weight = contender.model.embed.weight
        predicted = costs(contender.plan, contender.model.config, context, batch, weight.itemsize)
        row = {"name": contender.name, "plan": contender.plan.spec, "context": context, "batch": batch}
        row |= {"memory_gb": args.memory_gb, "step": step, "tokens_per_s": batch / step}
        rows.append(row | {"predicted": asdict(predicted)})
    return rows


def latency_table(rows: list[dict], reference: str) -> str:
    """Measured and, in brackets, predicted; ratios to the reference with the same prompt."""
    wide = max(len(r["name"]) for r in rows)
    lines = [
        f"{'':{wide}}  prompt  {'cache':>8} {'ratio (pred.)':>13}   {'TTFT':>8} {'ratio (pred.)':>13}   "
        f"{'TPOT':>8} {'ratio (pred.)':>13}  tokens/s  of bandwidth"
    ]
    for r in rows:
        (base,) = (b for b in rows if b["name"] == reference and b["prompt"] == r["prompt"])
        p, q = r["predicted"], base["predicted"]

        def ratio(measured: str, predicted: str, r=r, base=base, p=p, q=q) -> str:
            return f"{r[measured] / base[measured]:.3f} ({p[predicted] / q[predicted]:.3f})"

        cache = f"{'':>8} {'':>13}"
        if r["cache_bytes"]:
            cache = f"{human(r['cache_bytes'], 'B'):>8} {ratio('cache_bytes', 'cache_bytes_per_token'):>13}"
        lines.append(
            f"{r['name']:{wide}}  {r['prompt']:6}  {cache}   {human(r['ttft'], 's'):>8} "
            f"{ratio('ttft', 'prefill_flops'):>13}   {1e3 * r['tpot']:5.1f} ms "
            f"{ratio('tpot', 'decode_bytes'):>13}  {r['batch'] / r['tpot']:8.1f}  {r['of_bandwidth']:.0%}"
        )
    return "\n".join(lines)


def capacity_table(rows: list[dict]) -> str:
    """Measured and, in brackets, what the bytes read by a step predict."""
    wide, base = max(len(r["name"]) for r in rows), rows[0]
    lines = [f"{'':{wide}}  {'batch':>5} {'step':>9}  {'tokens/s':>8}  ratio (pred.)"]
    for r in rows:
        predicted = [x["batch"] / x["predicted"]["decode_bytes"] for x in (r, base)]
        lines.append(
            f"{r['name']:{wide}}  {r['batch']:5} {1e3 * r['step']:6.0f} ms  {r['tokens_per_s']:8.1f}  "
            f"{r['tokens_per_s'] / base['tokens_per_s']:5.2f} ({predicted[0] / predicted[1]:.2f})"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Time to first token and time per token over the length of the prompt, a line per contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), dpi=150)
    for ax, key, unit, what in (
        (axes[0], "ttft", 1, "time to first token, seconds"),
        (axes[1], "tpot", 1e3, "time per token, milliseconds"),
    ):
        for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
            own = [r for r in rows if r["name"] == name]
            marker, dash, colour = LOOKS[i % len(LOOKS)]
            x, y = [r["prompt"] for r in own], [unit * r[key] for r in own]
            ax.plot(x, y, marker=marker, linestyle=dash, color=colour, label=name, linewidth=1.6)
        ax.set_xscale("log", base=2)
        ticks = sorted({r["prompt"] for r in rows})
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xlabel("prompt, tokens")
        ax.set_ylabel(what)
        ax.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    content = io.BytesIO()
    fig.savefig(content, format="png")
    replace_file(path, content.getbuffer())
    plt.close(fig)


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


def training(args, device: str, dtype: torch.dtype) -> list[dict]:
    """One row per way to train, taking turns step by step: tokens/s, FLOP/s and peak memory."""
    sizes = SHAPE | {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    half = max(1, sizes["n_layer"] // 2)
    ways = {"normal": "full", "stochastic p=0.5": "full", "fusedkv": "fusedkv"}
    ways["cyclic, 7 + 2 passes"] = f"sandwich-top:{half}"
    router = StochasticRouter(sizes["n_layer"], 0.5)
    steps, flops, times = {}, {}, {name: [] for name in ways}
    for name, plan in ways.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**sizes, plan=plan, block_size=args.block_size)).to(device)
        if args.compile:
            kernels.compile_model(model)
        optimizer = make_optimizer(model, TrainConfig(optimizer=args.optimizer))
        idx = torch.randint(sizes["vocab_size"], (args.batch, args.block_size), device=device)
        flops[name] = costs(model.plan, model.config, args.block_size).train_flops * args.batch

        def step(n: int, model=model, optimizer=optimizer, idx=idx, name=name):
            with autocast(device, dtype):
                loss = model(idx, idx, plan=router.plan(n) if name.startswith("stochastic") else None)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    turns = 4 + args.repeats
    progress = Progress("training", turns * len(ways))
    for turn in range(turns):
        for i, (name, step) in enumerate(steps.items()):
            clock = Clock(device)
            clock.mark()
            step(turn)
            clock.mark()
            times[name] += clock.steps() if turn >= 4 else []  # the first ones compile
            progress(turn * len(ways) + i + 1, name)
    peak = matmul_peak(device, dtype)
    rows = []
    for name, step in steps.items():
        memory = peak_memory(lambda step=step: step(0), device)
        second = statistics.median(times[name])
        row = {"name": name, "plan": ways[name], "tokens_per_s": args.batch * args.block_size / second}
        row |= {"flops_per_s": flops[name] / second, "of_peak": flops[name] / second / peak}
        rows.append(row | {"peak_memory": memory, "batch": args.batch, "block_size": args.block_size})
    return rows


def training_table(rows: list[dict]) -> str:
    wide, base = max(len(r["name"]) for r in rows), rows[0]
    lines = [f"{'':{wide}}  tokens/s  ratio       FLOP/s  of matmul peak  peak memory"]
    for r in rows:
        lines.append(
            f"{r['name']:{wide}}  {r['tokens_per_s']:8,.0f}  {r['tokens_per_s'] / base['tokens_per_s']:5.2f}"
            f"  {human(r['flops_per_s']):>11}  {r['of_peak']:14.0%}  {human(r['peak_memory'], 'B'):>11}"
        )
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", help="a run to measure; its own sizes, its plans, results written there")
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, help=f"without --out_dir [{default}]")
    parser.add_argument(
        "--plans", nargs="+", metavar="SPEC", help=f"[{' '.join(PLANS)}]; the first is the reference"
    )
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[64, 1024, 8192], metavar="N", help="tokens [64 1024 8192]"
    )
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens to generate after each [16]")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once [1]")
    parser.add_argument("--repeats", type=int, default=3, help="turns [3]")
    parser.add_argument(
        "--memory_gb", type=float, help="measure throughput at the largest batch whose cache fits"
    )
    parser.add_argument(
        "--peer", choices=("hf",), help="hf: transformers' model with the same weights beside ours"
    )
    parser.add_argument(
        "--compile", action=BooleanOptionalAction, default=True, help="compile the decode step"
    )
    parser.add_argument("--train", action="store_true", help="measure training steps instead")
    parser.add_argument("--block_size", type=int, default=256, help="with --train: tokens per sequence [256]")
    parser.add_argument(
        "--optimizer", default="adamw", choices=("adamw", "muon"), help="with --train [adamw]"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[auto]")
    args = parser.parse_args()
    for name, low in (("new_tokens", 2), ("batch", 1), ("repeats", 1), ("block_size", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)} is not valid; it must be {low} or more")
    if min(args.prompts) < 1:
        raise UserError(f"--prompts {min(args.prompts)} is not valid; it must be 1 or more")
    device = pick_device(args.device)
    total = device_memory(device)
    if args.memory_gb is not None and not 0 < 1e9 * args.memory_gb <= total:
        have = f"{device} has {human(total, 'B')}"
        raise UserError(f"--memory_gb {args.memory_gb:g} is not valid; it must be above 0, and {have}")
    if args.memory_gb and args.new_tokens > max(args.prompts):
        raise UserError(f"--memory_gb needs --prompts of {args.new_tokens} or more, as many as --new_tokens")
    dtype, _ = pick_dtype(args.dtype, device)
    where = device + f", {torch.get_num_threads()} threads" * (device == "cpu")
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else where
    about = {"device": where, "dtype": str(dtype)[6:], "compile": args.compile, "torch": torch.__version__}
    about |= {"command": " ".join(sys.argv)}
    if args.train:
        folder = Path("out/bench")
        rows = training(args, device, dtype)
        print(f"{where}, {about['dtype']}, {'compiled' if args.compile else 'not compiled'}")
        print(training_table(rows))
        folder.mkdir(parents=True, exist_ok=True)
        write_lines([about | r for r in rows], folder / "bench_train.jsonl")
        print(f"wrote {folder}/bench_train.jsonl")
        return
    prompts = sorted(set(args.prompts))
    need = max(prompts) + args.new_tokens
    sizes = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    if args.out_dir is None:
        folder = Path("out/bench")
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPE | sizes, block_size=need, tie_embeddings=False))
    elif sizes:
        raise UserError(f"--{next(iter(sizes))} is for random weights; {args.out_dir} has its own sizes")
    else:
        folder = Path(args.out_dir)
        model, _ = load_run(folder)
        if need > model.config.block_size:
            raise UserError(
                f"--prompts {max(prompts)} and {args.new_tokens} new tokens do not fit the context of "
                f"{model.config.block_size} of {folder}; ask for shorter ones"
            )
    model = model.to(device, dtype).eval()
    names = args.plans or [p for p in PLANS if model.config.n_layer > 3 or p == "full"]
    if not args.plans and model.plan.spec != "full":
        names = [model.plan.spec]
    if args.peer and model.plan.spec != "full":
        raise UserError(f"--peer hf knows no sharing, and {args.out_dir} was built for {model.plan.spec!r}")
    specs = [auto_plan(spec, args.out_dir or "") for spec in names]
    contenders = [Ours(model, spec) for spec in dict.fromkeys(specs)]
    for contender in contenders:
        cost = costs(contender.plan, model.config, bytes_per_value=model.embed.weight.itemsize)
        cache = args.batch * need * cost.cache_bytes_per_token
        if cache > total:
            raise UserError(
                f"--batch {args.batch} of {need} tokens: the cache under {contender.name} needs "
                f"{human(cache, 'B')}, and {device} has {human(total, 'B')}; ask for less"
            )
    memory = args.memory_gb and args.memory_gb * 1e9
    batches = {c.name: largest_batch(c, max(prompts), memory) for c in contenders} if memory else {}
    peers = [HuggingFace(model)] if args.peer else []
    if args.compile:
        for model in {id(c.model): c.model for c in contenders}.values():
            kernels.compile_decode(model)
    start = time.monotonic()
    n_params = sum(p.numel() for p in contenders[0].model.parameters())
    what = f"{human(n_params)} parameters, {about['dtype']}, {where}"
    print(f"{what}; batch {args.batch}, median of {args.repeats} turns", flush=True)
    rows = interleaved(contenders + peers, prompts, args)
    print(
        f"memory is read at {human(rows[0]['bandwidth'], 'B/s')}; ratios to {contenders[0].name}, "
        "predicted in brackets"
    )
    print(latency_table(rows, contenders[0].name))
    if batches:
        capacity = at_capacity(contenders, batches, max(prompts), args)
        print(f"\nthe largest batch of {max(prompts)} tokens each in {args.memory_gb:g} GB of cache")
        print(capacity_table(capacity))
        rows += capacity
    folder.mkdir(parents=True, exist_ok=True)
    write_lines([about | r for r in rows], folder / "bench.jsonl")
    draw([r for r in rows if "ttft" in r], folder / "bench.png", what)
    print(f"\nwrote {folder}/bench.jsonl and bench.png in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    run(main)
