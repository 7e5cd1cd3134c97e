"""Generate text from a checkpoint under one or several sharing plans.

python sample.py --out_dir out/stochastic --start "def main("
python sample.py --out_dir out/stochastic --plan full --plan cla:2 --plan keep:0 --start FILE:prompt.txt
"""

import argparse
import time
from pathlib import Path

import torch

import cli
import data
import kernels
from cli import Parser, UserError, human
from devices import pick_device, pick_dtype, require_compiler
from kv_router import Plan
from model import GPT, KVCache
from runs import load_run
from sweep import auto_plan


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", default="out/run", help="the run to sample from [out/run]")
    parser.add_argument(
        "--plan",
        action="append",
        metavar="SPEC",
        help="a plan, or auto:0.5 for the best that sweep.py --search found within half the cache; may be "
        "given several times [the run's own]",
    )
    parser.add_argument(
        "--start", default="", metavar="TEXT|FILE:PATH", help="the prompt [empty: the start of a document]"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="samples per plan [1]")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to generate [128]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [0.8]")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k likeliest tokens; 0: all [50]"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same for every plan [0]")
    parser.add_argument("--ignore_eot", action="store_true", help="go on after the end of a text")
    parser.add_argument(
        "--exact_prefill", action="store_true", help="feed the prompt token by token (exact for cyclic plans)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decode step: for many tokens (on a GPU a CUDA graph)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of weights and cache [auto]"
    )
    args = parser.parse_args()
    for name, low in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(args, name) >= low:
            raise UserError(f"--{name} {getattr(args, name)} is not valid; it must be {low} or more")
    if 0 < args.temperature < 1e-6 or args.temperature == float("inf"):
        raise UserError(
            f"--temperature {args.temperature} is not valid; it must be 0 (greedy) or 1e-6 or more"
        )
    if not 0 <= args.seed <= (1 << 63) - args.num_samples:
        raise UserError(f"--seed {args.seed} is not valid; it must be 0 or more and below 2**63")
    return args


def print_sample(model: GPT, enc, text: str, prompt: list[int], cache: KVCache, seed: int, args) -> str:
    """Print a continuation as it is generated. Returns what there is to say of its speed and exactness."""
    options = {"temperature": args.temperature, "top_k": args.top_k or None, "seed": seed, "cache": cache}
    options |= {"exact_prefill": args.exact_prefill, "n_vocab": enc.n_vocab}
    idx = torch.tensor([prompt], device=model.embed.weight.device)
    stops = set() if args.ignore_eot else {enc.eot_token, *model.config.stop_tokens}
    stream = data.TextStream(enc)
    cache.length = 0
    print(text, end="", flush=True)
    times = [time.perf_counter()]
    for token in model.stream(idx, args.max_new_tokens, **options):
        token = token.item()  # waits for the device
        times.append(time.perf_counter())
        if token in stops:
            break
        print(stream(token), end="", flush=True)
    print(stream.rest())
    notes = f"first token after {1e3 * (times[1] - times[0]):.0f} ms"
    if cache.plan.cyclic and not args.exact_prefill:
        settled = f"budget used, still changing by {cache.change:.1g}: --exact_prefill"
        notes += f" (passes: {cache.passes}, {settled if cache.change else 'settled'})"
    if len(times) > 2:
        notes += f", then {(len(times) - 2) / (times[-1] - times[1]):.0f} tokens/s"
    return notes


def main():
    args = arguments()
    device = pick_device(args.device, many_shapes=True)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.compile:
        require_compiler(device, "leave --compile out")
    model, _ = load_run(args.out_dir, device)
    model.to(dtype)
    enc = data.load_tokenizer(args.out_dir)
    text = data.read_text(Path(args.start[5:])) if args.start.startswith("FILE:") else args.start
    if enc.n_vocab > model.config.vocab_size:
        raise UserError(f"the tokenizer in {args.out_dir} has more tokens than its model; copy the right one")
    prompt = data.prompt(enc, text)
    if len(prompt) + args.max_new_tokens > model.config.block_size:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {args.max_new_tokens} new ones do not fit the context of "
            f"{model.config.block_size}; shorten --start or lower --max_new_tokens"
        )
    specs = [auto_plan(spec, args.out_dir) for spec in args.plan or [model.plan.spec]]
    plans: list[Plan] = [model.resolve(spec) for spec in specs]
    if args.compile:
        kernels.compile_decoding(model)
    for spec, plan in zip(specs, plans):
        cache = KVCache(model.config, plan, 1, len(prompt) + args.max_new_tokens, dtype, device)
        if args.compile:  # here, so that no sample is charged for it
            list(model.stream(torch.tensor([prompt[:1]], device=device), 2, cache=cache))
        for i in range(args.num_samples):
            print(f"--- {spec}" + (f", sample {i + 1}" if args.num_samples > 1 else ""))
            notes = print_sample(model, enc, text, prompt, cache, args.seed + i, args)
            whole = human(cache.bytes / plan.cache_ratio, "B")
            size = f"cache {human(cache.bytes, 'B')} of {whole} ({plan.cache_ratio:.1%})"
            print(f"--- {spec}: {notes}; {size} for {cache.max_len} tokens\n")


if __name__ == "__main__":
    cli.run(main)
