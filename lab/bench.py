"""Time to first token (TTFT), time per token (TPOT), throughput and cache memory by plan, each next to what
`support/costs.py` predicts. The plans take turns, so that a noisy machine is as noisy to all of them, and
figures are medians over the turns.

python -m lab.bench                                                # 125M parameters, random weights
python -m lab.bench --dtype bfloat16 --peer hf --prompts 64 8192   # next to transformers' model
python -m lab.bench --out_dir out/stochastic --plans full cla:2 auto:0.25 --prompts 64 192
python -m lab.bench --train --config config/demo.toml              # speed and memory of training instead
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import kernels
from kv_router import PlanError
from lab import bench_train
from model import GPT, GPTConfig, KVCache
from support import cli, hf
from support.cli import Parser, Progress, UserError, at_least, human, table, user_path, write_lines
from support.convert import convert
from support.costs import costs
from support.devices import device_name, pick_device, pick_dtype, require_compiler
from support.hf import results_folder
from support.plots import line, picture
from sweep import auto_plan

import torch
from torch import Tensor

SHAPE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "n_embd": 768, "vocab_size": 32000}  # 125M parameters
PLANS = ["full", "yoco", "fusedkv", "fusedkv-lite", "cla:4"]


# --- contenders -------------------------------------------------------------------------------------------


class Ours:
    """A model under a plan, to be timed."""

    def __init__(self, model: GPT, spec: str):
        try:
            self.plan = model.resolve(spec)
        except PlanError:  # it lacks gates: a copy that has some takes as long as a trained one
            model = convert(model, spec)
            self.plan = model.plan
        self.model, self.name, self.kept = model, spec, {}
        self.placement = {"dtype": model.embed.weight.dtype, "device": model.embed.weight.device}
        self.vocab_size = model.config.vocab_size

    def predicted(self, context: int, batch: int):
        return costs(self.plan, self.model.config, context, batch, self.placement["dtype"].itemsize)

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache, in the same memory at every use, as CUDA graphs need it."""
        # A recorded step writes where it was recorded.
        if (batch, length) not in self.kept:
            self.kept[batch, length] = KVCache(self.model.config, self.plan, batch, length, **self.placement)
        self.kept[batch, length].length = 0
        return self.kept[batch, length]

    def tokens(self, idx: Tensor, n: int, cache: KVCache):
        yield from self.model.stream(idx, n, temperature=0, cache=cache)


class HuggingFace:
    """transformers' own model with the same weights, handed over in memory."""

    def __init__(self, model: GPT):
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as e:
            raise UserError("--peer hf needs the package transformers: pip install transformers") from e
        if model.plan.spec != "full":
            raise UserError(f"--peer hf knows no sharing, and the model was built for {model.plan.spec!r}")
        config, weights = hf.export(model)
        config = AutoConfig.for_model(**config)
        # No second copy of the weights: built without memory, then handed ours.
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=model.embed.weight.dtype)
        # Tensors are assigned, not copied, so both models read the same memory.
        self.model.load_state_dict(weights, assign=True)
        with model.embed.weight.device:  # the table of angles is not among the weights
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        self.model.eval()
        ours = Ours(model, "full")
        self.name, self.plan, self.predicted = "transformers", model.plan, ours.predicted
        self.placement, self.vocab_size = ours.placement, ours.vocab_size

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


class Clock:
    """Marks moments, and gives the seconds between them once all are past. On a GPU the marks are CUDA
    events, so that taking them does not hold up the work."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self):
        """Note this moment."""
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
        if self.cuda:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        """Between each mark and the next one. Waits for a GPU."""
        pairs = zip(self.marks, self.marks[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def bandwidth(x: Tensor) -> float:
    """Bytes per second at which this device reads a large tensor; the best of three, to be fair to it."""
    clock = Clock(x.device)
    for _ in range(4):
        clock.mark()
        x.sum()
    return x.nbytes / min(clock.seconds())


def measure(contender, prompt: int, batch: int, filled: int, n: int) -> tuple:
    """TTFT and TPOT in seconds, and the cache in bytes, of a prompt and n new tokens, after `filled`
    positions that are in the cache already."""
    device, vocab_size = contender.placement["device"], contender.vocab_size
    # Random tokens: time does not depend on which.
    idx = torch.randint(vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    cache = contender.cache(batch, filled + prompt + n)
    if filled:
        for store in (*cache.k.values(), *cache.v.values()):
            store.fill_(0.01)  # memory that no one wrote is not really read
        cache.length = filled
    # From here on only marks are taken.
    clock = Clock(device)
    clock.mark()
    for _ in contender.tokens(idx, n, cache):
        clock.mark()
    ttft, *each = clock.seconds()
    if filled:
        contender.kept.clear()  # no two of this size may fit the memory
    return ttft, median(each), getattr(cache, "bytes", None)  # a peer does not say what its cache takes


def take_turns(cases: dict, repeats: int) -> dict[tuple, list]:
    """What every case gives, called in turn."""
    found, progress = {key: [] for key in cases}, Progress("measuring", repeats * len(cases))
    for turn in range(repeats):
        for i, (key, case) in enumerate(cases.items()):
            found[key].append(case())
            progress(turn * len(cases) + i + 1, key[0])
    progress.close()
    return found


def latencies(contenders: list, cases: list[tuple], args) -> list[dict]:
    """One row per case, (contender, prompt, batch, positions that are filled): medians over the turns. Before
    each measurement the memory's bandwidth is measured too."""
    device = contenders[0].placement["device"]
    big, speeds, calls = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device), [], {}
    for contender, *sizes in cases:

        def case(contender=contender, sizes=sizes):
            speeds.append(bandwidth(big))
            return measure(contender, *sizes, args.new_tokens)

        if device.type == "cuda" or sizes[0] <= min(args.prompts):
            case()  # compiles; on a CPU long prompts would add nothing to that
        calls[contender.name, *sizes] = case
    found, rows = take_turns(calls, args.repeats), []
    for (contender, prompt, batch, filled), turns in zip(cases, found.values()):
        ttft, tpot, size = (None if None in values else median(values) for values in zip(*turns))
        expected, ttft = contender.predicted(prompt + filled, batch), None if filled else ttft
        rows.append({
            "name": contender.name, "plan": contender.plan.spec, "context": prompt + filled, "batch": batch,
            "cache_bytes": size, "ttft": ttft, "tpot": tpot, "tokens_per_s": batch / tpot,
            "predicted": {
                "cache_bytes": batch * expected.cache_bytes_per_token, "ttft": expected.prefill_flops,
                "tpot": expected.decode_bytes, "tokens_per_s": batch / expected.decode_bytes,
            },
            "bandwidth": median(speeds), "of_bandwidth": expected.decode_bytes / tpot / median(speeds),
        })  # fmt: skip
    return rows


def at_capacity(contenders: list, args) -> list[tuple]:
    """Cases whose batch is the largest whose cache fits --memory_gb, filled but for the new tokens."""
    # The cache is filled without a prefill, which would take minutes and is measured elsewhere.
    positions, memory = max(args.prompts), 1e9 * args.memory_gb
    blocks, cases = max(2, -(-positions // kernels.BLOCK)), []
    for contender in contenders:
        need = blocks * kernels.BLOCK * contender.predicted(1, 1).cache_bytes_per_token
        if not need <= memory < float("inf"):
            raise UserError(
                f"--memory_gb {args.memory_gb:g}: the cache of one sequence of {positions} tokens under "
                f"{contender.name} needs {human(need, 'B')}; ask for more, or for shorter --prompts"
            )
        cases.append((contender, 1, int(memory // need), positions - args.new_tokens - 1))
    return cases


def report(rows: list[dict]) -> str:
    """Measured figures, and their ratios to the first row of the same context, predicted ones in brackets."""
    names = {"cache_bytes": "cache", "ttft": "TTFT", "tpot": "TPOT", "tokens_per_s": "tokens/s"}
    lines = [["", "context", "batch", *(cell for name in names.values() for cell in (name, "ratio (pred.)"))]]
    lines[0].append("of bandwidth")
    for row in rows:
        # Ratios within one context, and apart for the largest batches, which have no first token.
        base = next(
            r for r in rows if (r["context"], r["ttft"] is None) == (row["context"], row["ttft"] is None)
        )
        cells = [row["name"], str(row["context"]), str(row["batch"])]
        for key in names:
            if row[key] is None:
                cells += ["", ""]
                continue
            unit = {"cache_bytes": "B", "tokens_per_s": ""}.get(key, "s")
            expected = row["predicted"][key] / base["predicted"][key]
            cells += [human(row[key], unit), f"{row[key] / base[key]:.3f} ({expected:.3f})"]
        lines.append(cells + [f"{row['of_bandwidth']:.0%}"])
    return table(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Time to first token and time per token over the length of the prompt, a line per contender."""
    rows = [row for row in rows if row["ttft"] is not None]
    prompts = sorted({row["context"] for row in rows})
    labels = {"ttft": "time to first token, seconds", "tpot": "time per token, seconds"}
    with picture(path, columns=2) as axes:
        for ax, (key, label) in zip(axes, labels.items()):
            for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
                line(ax, prompts, [row[key] for row in rows if row["name"] == name], i, name)
            ax.set_xscale("log", base=2)
            ax.set_xticks(prompts, [f"{n:,}" for n in prompts])
            ax.set(xlabel="prompt, tokens", ylabel=label)
        axes[0].set_yscale("log")
        axes[1].set_ylim(bottom=0)
        axes[0].figure.suptitle(title, fontsize=10)


# --- the command line -------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=user_path, help="a run to measure, or hf:FOLDER: its own sizes and plans")
    for name, default in SHAPE.items():
        add(f"--{name}", type=at_least(1), help=f"of random weights, without --out_dir [{default}]")
    add("--plans", nargs="+", metavar="SPEC", help=f"the first is the reference [{' '.join(PLANS)}]")
    add("--prompts", nargs="+", type=at_least(1), default=[64, 1024, 8192], help="tokens [64 1024 8192]")
    add("--new_tokens", type=at_least(2), default=16, help="tokens to generate after each [16]")
    add("--batch", type=at_least(1), default=1, help="sequences at once [1]")
    add("--repeats", type=at_least(1), default=3, help="turns [3]")
    add("--memory_gb", type=float, help="also: throughput at the largest batch that fits")
    add("--peer", choices=("hf",), help="hf: transformers' model with the same weights")
    add("--no_compile", action="store_true", help="do not compile")
    add("--train", action="store_true", help="measure training steps instead")
    add("--config", type=user_path, help="with --train: a recipe, for example config/demo.toml")
    add("--optimizer", choices=("adamw", "muon"), help="with --train [the recipe's]")
    add("--save_dir", type=user_path, help="where the results go [the run's folder, or out/bench]")
    add("--device", default="auto", help="cpu, cuda, ... [auto]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[auto]")
    args = parser.parse_args()
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
        model, _ = hf.load(args.out_dir, "cpu")
        if need > model.config.block_size:
            raise UserError(
                f"--prompts {max(args.prompts)} and {args.new_tokens} new tokens do not fit the context of "
                f"{model.config.block_size} of {args.out_dir}; ask for shorter ones"
            )
    if args.out_dir is None and (searched := [spec for spec in args.plans or () if spec[:5] == "auto:"]):
        raise UserError(f"--plans {searched[0]} takes what was searched for a run; name that: --out_dir")
    # A model built for a plan runs that; one with every layer's KV, all of the usual ones.
    own = PLANS if model.plan.spec == "full" and model.config.n_layer > 3 else [model.plan.spec]
    specs = dict.fromkeys(auto_plan(spec, args.out_dir, model) for spec in args.plans or own)
    model = model.to(device, dtype).eval()
    return [Ours(model, spec) for spec in specs]


def main():
    args = arguments()
    device = pick_device(args.device, many_shapes=True)
    if not args.no_compile:
        require_compiler(device, "add --no_compile")
    dtype, _ = pick_dtype(args.dtype, device)
    where = device_name(device) + f", {torch.get_num_threads()} threads" * (device == "cpu")
    about = {"device": where, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    about |= {"compile": not args.no_compile, "command": " ".join(sys.argv)}
    folder = results_folder(args.save_dir, [args.out_dir or "out/bench"])
    if args.train:
        bench_train.measure(args, device, dtype, about, folder / "bench_train.jsonl", take_turns)
        return
    contenders = make_contenders(args, device, dtype)
    everyone = contenders + ([HuggingFace(contenders[0].model)] if args.peer else [])
    cases = [(contender, prompt, args.batch, 0) for prompt in args.prompts for contender in everyone]
    if args.memory_gb is not None:
        cases += at_capacity(contenders, args)
    if not args.no_compile:
        for model in {id(c.model): c.model for c in contenders}.values():
            kernels.compile_decoding(model)
    n_params = sum(p.numel() for p in contenders[0].model.parameters())
    what = f"{human(n_params)} parameters, {about['dtype']}, {where}"
    print(f"{what}; median of {args.repeats} turns", flush=True)
    rows = latencies(contenders, cases, args)
    speed = human(rows[0]["bandwidth"], "B/s")
    print(f"memory is read at {speed}; ratios to {contenders[0].name} (predicted)")
    print(report(rows))
    draw(rows, folder / "bench.png", what)
    write_lines([about | row for row in rows], folder / "bench.jsonl")
    print(f"wrote {folder}/bench.jsonl and bench.png")


if __name__ == "__main__":
    cli.run(main)
