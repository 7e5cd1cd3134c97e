"""Generate text from a checkpoint under one or several sharing plans.

python sample.py --out_dir out/stochastic --start "def main("
python sample.py --out_dir out/stochastic --plan full --plan cla:2 --plan keep:0 --start FILE:prompt.txt
"""

import codecs
import time
from pathlib import Path

import torch

import data
import kernels
from cli import Parser, UserError, run
from kv_router import human
from model import KVCache
from sweep import auto_plan
from train import load_run, pick_device, pick_dtype


def main():
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
        "--top_k", type=int, default=50, help="sample among the k likeliest tokens; 0 for all [50]"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same for every plan [0]")
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
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    model, _ = load_run(args.out_dir, device)
    model.to(dtype)
    if args.compile:
        kernels.compile_decode(model)
    enc = data.load_tokenizer(args.out_dir)
    text = data.read_text(Path(args.start[5:])) if args.start.startswith("FILE:") else args.start
    if enc.n_vocab > model.config.vocab_size:
        raise UserError(f"the tokenizer in {args.out_dir} has more tokens than its model; copy the right one")
    prompt = enc.encode_ordinary(text) or [enc.eot_token]
    room = model.config.block_size - args.max_new_tokens
    if len(prompt) > room:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {args.max_new_tokens} new ones do not fit the context of "
            f"{model.config.block_size}; shorten --start or lower --max_new_tokens"
        )
    specs = [auto_plan(spec, args.out_dir) for spec in args.plan or [model.plan.spec]]
    plans = [model.resolve(spec) for spec in specs]
    idx = torch.tensor([prompt], device=device)
    for spec, plan in zip(specs, plans):
        cache = KVCache(model.config, plan, 1, len(prompt) + args.max_new_tokens, dtype, device)
        for i in range(args.num_samples):
            cache.length = 0
            print(f"--- {spec}" + (f", sample {i + 1}" if args.num_samples > 1 else ""))
            print(text, end="", flush=True)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
            times = [time.perf_counter()]
            for token in model.stream(
                idx,
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k or None,
                seed=args.seed + i,
                cache=cache,
                exact_prefill=args.exact_prefill,
            ):
                print(decoder.decode(data.token_bytes(enc, token.item())), end="", flush=True)
                times.append(time.perf_counter())
            print(decoder.decode(b"", final=True))
            notes = f"first token after {1e3 * (times[1] - times[0]):.0f} ms"
            if plan.cyclic and not args.exact_prefill:
                settled = cache.change < 4 * torch.finfo(dtype).eps
                end = (
                    "settled"
                    if settled
                    else f"budget used, KV still changing by {cache.change:.1g}: --exact_prefill"
                )
                notes += f" (passes: {cache.passes}, {end})"
            if len(times) > 2:
                notes += f", then {(len(times) - 2) / (times[-1] - times[1]):.0f} tokens/s"
            whole = human(cache.bytes / plan.cache_ratio, "B")
            notes += f"; cache {human(cache.bytes, 'B')} of {whole} ({plan.cache_ratio:.1%})"
            print(f"--- {spec}: {notes} for {cache.max_len} tokens\n")


if __name__ == "__main__":
    run(main)
