"""Time to first token, time per token, throughput and cache memory by plan, each next to what `costs.py`
predicts. The plans take turns, so that a noisy machine is as noisy to all of them, and figures are medians
over the turns.

python -m lab.bench                                                # 125M parameters, random weights
python -m lab.bench --dtype bfloat16 --peer hf --prompts 64 8192   # next to transformers' model
python -m lab.bench --out_dir out/stochastic --plans full cla:2 auto:0.25 --prompts 64 192
python -m lab.bench --train --config config/demo.toml              # speed and memory of training instead
"""

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import cli
import hf
import kernels
from cli import Parser, Progress, UserError, duration, human, table, write_lines
from costs import costs
from devices import device_memory, device_name, pick_device, pick_dtype, require_compiler
from kv_router import PlanError
from lab import bench_train
from lab.clock import Clock
from model import GPT, GPTConfig, KVCache
from plots import line, picture
from runs import load_run
from sweep import auto_plan

SHAPE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "n_embd": 768, "vocab_size": 32000}  # 125M parameters
PLANS = ["full", "yoco", "fusedkv", "fusedkv-lite", "cla:4"]


# --- contenders -------------------------------------------------------------------------------------------


class Ours:
    """A model under a plan, to be timed."""

    def __init__(self, model: GPT, spec: str):
        try:
            self.plan = model.resolve(spec)
        except PlanError:  # it lacks gates: a copy that has some takes as long as a trained one
            model = hf.convert(model, spec)
            self.plan = model.plan
        self.model, self.name, self.caches = model, spec, {}
        weight = model.embed.weight
        self.placement = {"dtype": weight.dtype, "device": weight.device}

    def predicted(self, context: int = 1, batch: int = 1):
        return costs(self.plan, self.model.config, context, batch, self.placement["dtype"].itemsize)

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache, in the same memory at every use, as CUDA graphs need it."""
        key = batch, length
        if key not in self.caches:
            self.caches[key] = KVCache(self.model.config, self.plan, batch, length, **self.placement)
        self.caches[key].length = 0
        return self.caches[key]

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
        with model.embed.weight.device:  # the table of angles is not among the weights
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        self.model.eval()
        self.name, self.plan = "transformers", model.plan
        self.predicted = Ours(model, "full").predicted

    def cache(self, batch: int, length: int) -> dict:
        return {"past_key_values": None}

    @torch.no_grad()
    def tokens(self, idx: Tensor, n: int, cache: dict):
        for _ in range(n):
            out = self.model(idx, use_cache=True, logits_to_keep=1, **cache)
            cache["past_key_values"] = out.past_key_values
            idx = out.logits[:, -1].argmax(-1, keepdim=True)
            yield idx


# --- measuring --------------------------------------------------------------------------------------------


def time_tokens(contender, idx: Tensor, n: int, cache) -> list[float]:
    """Seconds until the first token, and then of each further one, of n in all."""
    clock = Clock(idx.device)
    clock.mark()
    for _ in contender.tokens(idx, n, cache):
        clock.mark()
    return clock.seconds()


def bandwidth(x: Tensor) -> float:
    """Bytes per second at which this device reads a large tensor; the best of three, to be fair to it."""
    clock = Clock(x.device)
    for _ in range(4):
        clock.mark()
        x.sum()
    return x.nbytes / min(clock.seconds())


def interleaved(contenders: list, prompts: list[int], args) -> list[dict]:
    """One row per contender and prompt length: medians over args.repeats turns. Before each measurement the
    memory's bandwidth is measured too."""
    base = contenders[0].model
    device, generator = base.embed.weight.device, torch.Generator().manual_seed(0)
    big = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    idx = torch.randint(base.config.vocab_size, (args.batch, max(prompts)), generator=generator).to(device)
    times, speeds, cache_bytes = {}, [], {}
    progress, done = Progress("measuring", args.repeats * len(contenders) * sum(prompts)), 0
    for turn in range(-1, args.repeats):  # the first turn compiles; long prompts would add nothing to it
        for length in prompts if turn >= 0 or device.type == "cuda" else prompts[:1]:
            for contender in contenders:
                cache = contender.cache(args.batch, length + args.new_tokens)
                speed = bandwidth(big)
                seconds = time_tokens(contender, idx[:, :length], args.new_tokens, cache)
                if turn >= 0:
                    speeds.append(speed)
                    times.setdefault((contender.name, length), []).append(seconds)
                    cache_bytes[contender.name, length] = getattr(cache, "bytes", None)
                    done += length
                    progress(done, f"{contender.name}, {length} tokens")
    progress.close()
    speed, rows = statistics.median(speeds), []
    for length in prompts:
        for contender in contenders:
            turns = times[contender.name, length]
            tpot = statistics.median(statistics.median(seconds[1:]) for seconds in turns)
            predicted = contender.predicted(length, args.batch)
            rows.append({
                "name": contender.name, "plan": contender.plan.spec, "prompt": length, "batch": args.batch,
                "ttft": statistics.median(seconds[0] for seconds in turns), "tpot": tpot,
                "cache_bytes": cache_bytes[contender.name, length],
                "bandwidth": speed, "of_bandwidth": predicted.decode_bytes / tpot / speed,
                "predicted": asdict(predicted),
            })  # fmt: skip
    return rows


def largest_batch(contender: Ours, context: int, memory: float) -> int:
    """How many sequences of `context` tokens the cache holds in `memory` bytes."""
    positions = max(2, -(-context // kernels.BLOCK)) * kernels.BLOCK
    need = positions * contender.predicted().cache_bytes_per_token
    if need > memory:
        raise UserError(
            f"--memory_gb {memory / 1e9:g}: the cache of one sequence of {context} tokens under "
            f"{contender.name} needs {human(need, 'B')}, and there are {human(memory, 'B')}; ask for "
            "more, or for shorter --prompts"
        )
    return int(memory // need)


def at_capacity(plans: list[Ours], batches: dict[str, int], context: int, args) -> list[dict]:
    """Decode throughput with the given (the largest) batches, their caches filled with `context` tokens."""
    times = {contender.name: [] for contender in plans}
    progress = Progress("at capacity", (args.repeats + 1) * len(plans))
    for turn in range(-1, args.repeats):
        for i, contender in enumerate(plans):
            seconds = time_full_cache(contender, batches[contender.name], context, args.new_tokens)
            if turn >= 0:
                times[contender.name].append(seconds)
            progress((turn + 1) * len(plans) + i + 1, contender.name)
    rows = []
    for contender in plans:
        batch, step = batches[contender.name], statistics.median(times[contender.name])
        row = {"name": contender.name, "plan": contender.plan.spec, "context": context, "batch": batch}
        row |= {"memory_gb": args.memory_gb, "step": step, "tokens_per_s": batch / step}
        rows.append(row | {"predicted": asdict(contender.predicted(context, batch))})
    return rows


def time_full_cache(contender: Ours, batch: int, context: int, n: int) -> float:
    """Seconds of a decode step; the cache is freed afterwards, as no two of this size may fit the memory."""
    contender.caches.clear()
    cache = contender.cache(batch, context)
    for store in (*cache.k.values(), *cache.v.values()):
        store.fill_(0.01)  # memory that no one wrote is not really read
    cache.length = context - n
    idx = torch.zeros(batch, 1, dtype=torch.long, device=cache.position.device)
    seconds = time_tokens(contender, idx, n, cache)
    contender.caches.clear()
    return statistics.median(seconds[1:])


# --- tables and a picture ---------------------------------------------------------------------------------


def latency_table(rows: list[dict], reference: str) -> str:
    """Measured figures, and their ratios to the reference with the same prompt, predicted ones in
    brackets."""
    lines = [["", "prompt"]]
    for name in ("cache", "TTFT", "TPOT"):
        lines[0] += [name, "ratio (pred.)"]
    lines[0] += ["tokens/s", "of bandwidth"]
    for row in rows:
        (base,) = (r for r in rows if r["name"] == reference and r["prompt"] == row["prompt"])
        cells = [row["name"], str(row["prompt"])]
        for measured, predicted, text in (
            ("cache_bytes", "cache_bytes_per_token", human(row["cache_bytes"] or 0, "B")),
            ("ttft", "prefill_flops", human(row["ttft"], "s")),
            ("tpot", "decode_bytes", f"{1e3 * row['tpot']:.1f} ms"),
        ):
            if row[measured] is None:  # a peer does not say what its cache takes
                cells += ["", ""]
                continue
            expected = row["predicted"][predicted] / base["predicted"][predicted]
            cells += [text, f"{row[measured] / base[measured]:.3f} ({expected:.3f})"]
        lines.append(cells + [f"{row['batch'] / row['tpot']:.1f}", f"{row['of_bandwidth']:.0%}"])
    return table(lines)


def capacity_table(rows: list[dict]) -> str:
    """Measured figures, and in brackets what the bytes read by a step predict."""
    lines = [["", "batch", "step", "tokens/s", "ratio (pred.)"]]
    predicted = [row["batch"] / row["predicted"]["decode_bytes"] for row in rows]
    for row, expected in zip(rows, predicted):
        ratio = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        cells = [row["name"], str(row["batch"]), f"{1e3 * row['step']:.0f} ms", f"{row['tokens_per_s']:.1f}"]
        lines.append(cells + [f"{ratio:.2f} ({expected / predicted[0]:.2f})"])
    return table(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Time to first token and time per token over the length of the prompt, a line per contender."""
    prompts = sorted({row["prompt"] for row in rows})
    with picture(path, columns=2) as axes:
        for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            own = [row for row in rows if row["name"] == name]
            x = [row["prompt"] for row in own]
            line(axes[0], x, [row["ttft"] for row in own], i, name)
            line(axes[1], x, [1e3 * row["tpot"] for row in own], i, name)
        for ax, label in zip(axes, ("time to first token, seconds", "time per token, milliseconds")):
            ax.set_xscale("log", base=2)
            ax.set_xticks(prompts, [f"{n:,}" for n in prompts])
            ax.set(xlabel="prompt, tokens", ylabel=label)
        axes[0].set_yscale("log")
        axes[1].set_ylim(bottom=0)
        axes[0].figure.suptitle(title, fontsize=10)


# --- the command line -------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", help="a run to measure: its own sizes and plans; results go there")
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, help=f"of random weights, without --out_dir [{default}]")
    parser.add_argument(
        "--plans", nargs="+", metavar="SPEC", help=f"the first is the reference [{' '.join(PLANS)}]"
    )
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[64, 1024, 8192], metavar="N", help="tokens [64 1024 8192]"
    )
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens to generate after each [16]")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once [1]")
    parser.add_argument("--repeats", type=int, default=3, help="turns [3]")
    parser.add_argument("--memory_gb", type=float, help="also: throughput at the largest batch that fits")
    parser.add_argument("--peer", choices=("hf",), help="hf: transformers' model with the same weights")
    parser.add_argument("--no_compile", action="store_true", help="do not compile")
    parser.add_argument("--train", action="store_true", help="measure training steps instead")
    parser.add_argument("--config", help="with --train: a recipe, for example config/demo.toml")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="with --train [the recipe's]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[auto]")
    args = parser.parse_args()
    for name, low in (("new_tokens", 2), ("batch", 1), ("repeats", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)} is not valid; it must be {low} or more")
    if min(args.prompts) < 1:
        raise UserError(f"--prompts {min(args.prompts)} is not valid; it must be 1 or more")
    args.prompts = sorted(set(args.prompts))
    if (args.config or args.optimizer) and not args.train:
        raise UserError("--config and --optimizer go with --train")
    return args


def make_contenders(args, device: str, dtype: torch.dtype) -> list[Ours]:
    """A run, or random weights, under the plans to compare."""
    sizes = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    need = max(args.prompts) + args.new_tokens
    if args.out_dir is None:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPE | sizes, block_size=need, tie_embeddings=False))
    elif sizes:
        raise UserError(f"--{next(iter(sizes))} is for random weights; {args.out_dir} has its own sizes")
    else:
        model, _ = load_run(args.out_dir)
        if need > model.config.block_size:
            raise UserError(
                f"--prompts {max(args.prompts)} and {args.new_tokens} new tokens do not fit the context of "
                f"{model.config.block_size} of {args.out_dir}; ask for shorter ones"
            )
    model = model.to(device, dtype).eval()
    names = args.plans or [p for p in PLANS if model.config.n_layer > 3 or p == "full"]
    if model.plan.spec != "full" or model.config.key_residual:
        names = args.plans or [model.plan.spec]
        if args.peer:
            added = " with --key_residual" if model.config.key_residual else ""
            raise UserError(
                f"--peer hf knows no sharing, and {args.out_dir} was built for {model.plan.spec!r}{added}"
            )
    specs = dict.fromkeys(auto_plan(spec, args.out_dir or "") for spec in names)
    return [Ours(model, spec) for spec in specs]


def check_memory(contenders: list[Ours], args, device: str) -> dict[str, int]:
    """UserError where caches would exceed the device's memory. Returns the batches for --memory_gb."""
    total, need = device_memory(device), max(args.prompts) + args.new_tokens
    for contender in contenders:
        cache = args.batch * need * contender.predicted().cache_bytes_per_token
        if cache > total:
            raise UserError(
                f"--batch {args.batch} of {need} tokens: the cache under {contender.name} needs "
                f"{human(cache, 'B')}, and {device} has {human(total, 'B')}; ask for less"
            )
    if args.memory_gb is None:
        return {}
    memory = 1e9 * args.memory_gb
    if not 0 < memory <= total:
        have = f"{device} has {human(total, 'B')}"
        raise UserError(f"--memory_gb {args.memory_gb:g} is not valid; it must be above 0, and {have}")
    if args.new_tokens > max(args.prompts):
        raise UserError(f"--memory_gb needs --prompts of {args.new_tokens} or more, as many as --new_tokens")
    return {contender.name: largest_batch(contender, max(args.prompts), memory) for contender in contenders}


def main():
    args = arguments()
    device = pick_device(args.device, many_shapes=True)
    if not args.no_compile:
        require_compiler(device, "add --no_compile")
    dtype, _ = pick_dtype(args.dtype, device)
    where = device_name(device) + f", {torch.get_num_threads()} threads" * (device == "cpu")
    about = {"device": where, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    about |= {"compile": not args.no_compile, "command": " ".join(sys.argv)}
    if args.train:
        bench_train.measure(args, device, dtype, about)
        return
    contenders = make_contenders(args, device, dtype)
    batches = check_memory(contenders, args, device)
    peers = [HuggingFace(contenders[0].model)] if args.peer else []
    if not args.no_compile:
        for model in {id(c.model): c.model for c in contenders}.values():
            kernels.compile_decoding(model)
    start = time.monotonic()
    n_params = sum(p.numel() for p in contenders[0].model.parameters())
    what = f"{human(n_params)} parameters, {about['dtype']}, {where}"
    print(f"{what}; batch {args.batch}, median of {args.repeats} turns", flush=True)
    rows = interleaved(contenders + peers, args.prompts, args)
    reference = contenders[0].name
    print(f"memory is read at {human(rows[0]['bandwidth'], 'B/s')}; ratios to {reference} (predicted)")
    print(latency_table(rows, reference))
    if batches:
        capacity = at_capacity(contenders, batches, max(args.prompts), args)
        print(f"\nthe largest batch of {max(args.prompts)} tokens each in {args.memory_gb:g} GB of cache")
        print(capacity_table(capacity))
        rows += capacity
    folder = Path(args.out_dir or "out/bench")
    folder.mkdir(parents=True, exist_ok=True)
    write_lines([about | row for row in rows], folder / "bench.jsonl")
    draw([row for row in rows if "ttft" in row], folder / "bench.png", what)
    print(f"\nwrote {folder}/bench.jsonl and bench.png in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    cli.run(main)
