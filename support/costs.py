"""What a plan costs: cache, parameters, bytes read per decode step, and FLOPs of prefill and training; and
how a plan is drawn.

    python kv_router.py fusedkv --n_layer 8 --n_embd 512 --context 32768

Plain Python, so that this takes an instant. `lab.bench` prints measurements next to these predictions.
"""

from dataclasses import dataclass
from types import SimpleNamespace

from kv_router import EXPLICIT, FAMILIES, Plan
from support import cli
from support.cli import Parser, at_least, human, table


@dataclass(frozen=True)
class Costs:
    """What a plan costs, counted, not measured."""

    params: int  # parameters of a model built for the plan
    cache_bytes_per_token: int  # of one sequence, over all layers
    decode_bytes: int  # read per decode step: all weights once, and each layer's sources over the context
    prefill_flops: int  # of one prompt of `context` tokens, with early exit above plan.last_full_layer
    train_flops: int  # forward and backward over one sequence of `context` tokens


def costs(plan: Plan, config, context: int = 8192, batch: int = 1, bytes_per_value: int = 2) -> Costs:
    """Predict a plan's costs with `context` tokens in each of `batch` sequences, for a model of the sizes in
    `config`, a model.GPTConfig (Table 1 of arXiv 2512.03870, with the weights counted too). A multiply-add is
    two FLOPs; norms, RoPE and softmax are left out.

    A layer that fuses m sources reads all m of them at decode, where its gates are folded into query and
    output. Over a whole prompt it fuses first and then attends once. A group that iterates pays for every
    pass in training and, at most, in prefill; decode runs its layers once."""
    kv_width = config.n_kv_head * config.head_dim
    q_width = config.n_head * config.head_dim
    C, T = config.n_embd, context

    # Each layer's parameters, and its FLOPs for one position: its own K and V, and everything else.
    params = 0
    kv_flops, other_flops, read_flops = [], [], []
    for i, route in enumerate(plan.routes):
        has_k, has_v = i in plan.k_layers, i in plan.v_layers
        kv_projections = (C + config.qkv_bias) * kv_width * (has_k + has_v)
        other_matrices = (C + config.qkv_bias) * q_width + q_width * C + 3 * C * config.n_hidden
        k_gates = kv_width // 2 * len(route.k) if len(route.k) > 1 else 0  # one for two features, see RoPE
        v_gates = kv_width * len(route.v) if len(route.v) > 1 else 0
        norms = 2 * C + config.qk_norm * config.head_dim * (1 + has_k)
        params += kv_projections + other_matrices + k_gates + v_gates + norms
        kv_flops.append(2 * kv_projections)
        other_flops.append(2 * other_matrices)
        read_flops.append(2 * q_width * (len(route.k) + len(route.v)))  # per cached position, at decode
    embedding = config.vocab_size * C
    params += C + embedding * (1 if config.tie_embeddings else 2)

    attention = 4 * q_width * T * (T + 1) // 2  # causal: all T queries over one (fused) K and V
    prefill = 2 * embedding  # the logits of the last position
    train = 3 * 2 * embedding * T  # a backward costs two forwards
    for low, high in plan.segments:
        forward, backward = (config.forward_passes, config.backward_passes) if low < high else (0, 1)
        # A pass runs all layers of the group but the last, of which only K and V are needed.
        one_pass = T * kv_flops[high]
        for i in range(low, high):
            one_pass += T * (kv_flops[i] + other_flops[i]) + attention
        train += (forward + 3 * backward) * one_pass + 3 * (T * other_flops[high] + attention)
        if high < plan.last_full_layer:
            prefill += (forward + backward) * one_pass + T * other_flops[high] + attention
            continue
        # Above the highest stored layer only the last position goes on.
        prefill += (forward + backward) * one_pass if high == plan.last_full_layer else kv_flops[high]
        prefill += other_flops[high] + T * read_flops[high]

    stored = kv_width * (len(plan.k_layers) + len(plan.v_layers))  # values per token
    reads = kv_width * sum(len(route.k) + len(route.v) for route in plan.routes)  # values per token and step
    weights = params - (0 if config.tie_embeddings else embedding)  # one row of the input table is read
    return Costs(
        params=params,
        cache_bytes_per_token=stored * bytes_per_value,
        decode_bytes=(weights + reads * context * batch) * bytes_per_value,
        prefill_flops=prefill,
        train_flops=train,
    )


def draw(plan: Plan) -> str:
    """A row for every layer, the bottom one last, and a column for every source layer. `KV` marks a layer
    that reads its own, `kv` one that reads another's, and `k` or `v` where only keys or values come from
    there."""
    width = max(3, len(str(len(plan) - 1)) + 1)
    columns = "".join(f"{j:>{width}}" for j in range(len(plan)))
    lines = [f"layer reads from{columns}   stores"]
    for low, high in reversed(plan.segments):
        for i in range(high, low - 1, -1):
            cells = ""
            for j in range(len(plan)):
                mark = "k" * (j in plan[i].k) + "v" * (j in plan[i].v) or "."
                cells += f"{mark.upper() if i == j else mark:>{width}}"
            stores = "K" * (i in plan.k_layers) + "V" * (i in plan.v_layers) or "-"
            notes = [f"iterated {low}-{high}"] if low < high else []
            if i == plan.last_full_layer:
                notes.append("<- last layer to see the whole prompt")
            lines.append(f"{i:>16}{cells}   {stores:6}   {'  '.join(notes)}".rstrip())
    return "\n".join(lines)


SIZES = {"n_layer": 8, "n_head": 4, "n_kv_head": 2, "n_embd": 128, "vocab_size": 4096}


def main():
    notations = [(notation, meaning) for notation, meaning, _ in FAMILIES.values()] + list(EXPLICIT.items())
    wide = max(len(notation) for notation, _ in notations)
    described = "\n".join(f"{notation:{wide}}  {meaning}" for notation, meaning in notations)
    parser = Parser(f"Draw a plan and print its costs.\n\n{described}")
    parser.add_argument("spec", metavar="SPEC", help="a plan, in the notation above")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help=f"[{default}]")
    parser.add_argument("--head_dim", type=at_least(1), help="[n_embd / n_head]")
    parser.add_argument("--n_hidden", type=at_least(1), help="[8/3 n_embd]")
    parser.add_argument("--forward_passes", type=at_least(0), default=7, help="of cyclic plans [7]")
    parser.add_argument("--backward_passes", type=at_least(1), default=2, help="of cyclic plans [2]")
    parser.add_argument("--context", type=at_least(1), default=8192, help="tokens per sequence [8192]")
    parser.add_argument("--batch", type=at_least(1), default=1, help="sequences [1]")
    parser.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="bytes per value [2, bf16]")
    args = parser.parse_args()
    args.head_dim = args.head_dim or args.n_embd // args.n_head
    if not args.head_dim:
        parser.error(f"--n_embd {args.n_embd} is below --n_head {args.n_head}; raise it or give --head_dim")
    args.n_hidden = args.n_hidden or -(-args.n_embd * 8 // 3 // 32) * 32  # as model.GPTConfig
    config = SimpleNamespace(**vars(args), tie_embeddings=True, qk_norm=False, qkv_bias=False)
    plan, full = (Plan.parse(spec, args.n_layer) for spec in (args.spec, "full"))

    canonical = "" if plan.spec == args.spec else f" ({plan.spec})"
    print(f"{args.spec}: {len(plan)} layers, {plan.cache_ratio:.1%} of the full cache{canonical}\n")
    print(draw(plan) + "\n")
    mine, whole = (costs(p, config, args.context, args.batch, args.bytes) for p in (plan, full))
    total = args.context * args.batch
    rows = [[f"{args.context} tokens x {args.batch}", "this plan", "full", "ratio"]]
    for name, unit, a, b in (
        ("parameters", "", mine.params, whole.params),
        ("cache per token", "B", mine.cache_bytes_per_token, whole.cache_bytes_per_token),
        ("cache in all", "B", mine.cache_bytes_per_token * total, whole.cache_bytes_per_token * total),
        ("read per decode step", "B", mine.decode_bytes, whole.decode_bytes),
        ("prefill of one prompt", "FLOP", mine.prefill_flops, whole.prefill_flops),
        ("training on one", "FLOP", mine.train_flops, whole.train_flops),
    ):
        rows.append([name, human(a, unit), human(b, unit), f"{a / b:.3f}"])
    print(table(rows))
    if plan.cyclic:
        passes = f"{args.forward_passes} passes without and {args.backward_passes} with gradient"
        print(f"\ncyclic: the iterated layers take {passes}; prefill stops sooner where their KV settles")


if __name__ == "__main__":
    cli.run(main, only_prints=True)
