"""Generate text from a checkpoint under one or several sharing plans.

python sample.py --out_dir out/stochastic --start "def main("
python sample.py --out_dir out/stochastic --plan full --plan cla:2 --plan keep:0 --start FILE:prompt.txt
"""

import argparse
import time
from pathlib import Path

import data
import kernels
from model import GPT, KVCache
from support import cli
from support.cli import Parser, UserError, at_least, human, read_text, user_path
from support.devices import pick_device, pick_dtype, require_compiler
from support.hf import with_tokenizer
from sweep import auto_plan

import torch


def arguments() -> argparse.Namespace:
    """The command line, checked as far as that goes without the model."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=user_path, default="out/run", help="a run, or hf:FOLDER [out/run]")
    add(
        "--plan",
        action="append",
        metavar="SPEC",
        help="a plan, or auto:0.5 for the best that sweep.py --search found within half the cache; may be "
        "given several times [the run's own]",
    )
    add("--start", default="", metavar="TEXT|FILE:PATH", help="the prompt [empty: the start of a document]")
    add("--num_samples", type=at_least(1), default=1, help="samples per plan [1]")
    add("--max_new_tokens", type=at_least(1), help="tokens to generate [128, or what fits the context]")
    add("--temperature", type=at_least(0.0), default=0.8, help="0 is greedy [0.8]")
    add("--top_k", type=at_least(0), default=50, help="sample from the k likeliest tokens; 0: all [50]")
    add("--seed", type=at_least(0, 1 << 62), default=0, help="the same for every plan [0]")
    add("--ignore_eot", action="store_true", help="go on after the end of a text")
    add("--exact_prefill", action="store_true", help="feed the prompt token by token (for cyclic plans)")
    add("--compile", action="store_true", help="compile the decode step: for many tokens")
    add("--device", default="auto", help="cpu, cuda, ... [auto]")
    add(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of weights and cache [auto]"
    )
    args = parser.parse_args()
    if 0 < args.temperature < 1e-6:
        raise UserError(
            f"--temperature {args.temperature} is not valid; it must be 0 (greedy) or 1e-6 or more"
        )
    return args


def print_sample(model: GPT, enc, text: str, prompt: list[int], cache: KVCache, seed: int, args) -> str:
    """Print a continuation as it is generated. Returns what there is to say of its speed."""
    # The same seed for every plan, so that differences come from the plan.
    options = {"temperature": args.temperature, "top_k": args.top_k or None, "seed": seed, "cache": cache}
    options |= {"exact_prefill": args.exact_prefill, "n_vocab": enc.n_vocab}
    idx = torch.tensor([prompt], device=model.embed.weight.device)
    # Chat models end a turn with a token of their own.
    stops = set() if args.ignore_eot else {enc.eot_token, *model.config.stop_tokens}
    stream = data.TextStream(enc)
    cache.length = 0
    print(text, end="", flush=True)
    # Prefill ends with the first token, decoding is the rest.
    times = [time.perf_counter()]
    for token in model.stream(idx, args.max_new_tokens, **options):
        token = token.item()  # waits for the device
        times.append(time.perf_counter())
        if token in stops:
            break
        print(stream(token), end="", flush=True)
    print(stream.rest())
    notes = f"first token after {1e3 * (times[1] - times[0]):.0f} ms"
    if len(times) > 2:
        notes += f", then {(len(times) - 2) / (times[-1] - times[1]):.0f} tokens/s"
    return notes


def main():
    args = arguments()
    device = pick_device(args.device, many_shapes=True)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.compile:
        require_compiler(device, "leave --compile out")
    model, enc = with_tokenizer(args.out_dir, device)
    text = read_text(Path(user_path(args.start[5:]))) if args.start.startswith("FILE:") else args.start
    prompt = data.prompt(enc, text)
    # What was asked for must fit; the default is what fits.
    room = model.config.block_size - len(prompt)
    args.max_new_tokens = args.max_new_tokens or max(1, min(128, room))
    if args.max_new_tokens > room:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {args.max_new_tokens} new ones do not fit the context of "
            f"{model.config.block_size}; shorten --start or lower --max_new_tokens"
        )
    specs = [auto_plan(spec, args.out_dir, model) for spec in args.plan or [model.plan.spec]]
    plans = [model.resolve(spec) for spec in specs]
    # Weights and cache in one dtype: decoding is bound by the bytes that it reads.
    model.to(dtype)
    if args.compile:
        kernels.compile_decoding(model)
    for spec, plan in zip(specs, plans):
        cache = KVCache(model.config, plan, 1, len(prompt) + args.max_new_tokens, dtype, device)
        if args.compile:  # here, so that no sample is charged for it
            list(model.stream(torch.tensor([prompt[:1]], device=device), 2, cache=cache))
        for i in range(args.num_samples):
            print(f"--- {spec}" + (f", sample {i + 1}" if args.num_samples > 1 else ""))
            notes = print_sample(model, enc, text, prompt, cache, args.seed + i, args)
            # What a cache of every layer would take, by the plan's own ratio.
            whole = human(cache.bytes / plan.cache_ratio, "B")
            size = f"cache {human(cache.bytes, 'B')} of {whole} ({plan.cache_ratio:.1%})"
            print(f"--- {spec}: {notes}; {size} for {cache.max_len} tokens")
        passes = model.config.forward_passes + model.config.backward_passes
        if plan.cyclic and passes < len(prompt) and not args.exact_prefill:
            print(f"the prompt took at most {passes} passes; --exact_prefill is exact whatever their number")
        print()


if __name__ == "__main__":
    cli.run(main, only_prints=True)
