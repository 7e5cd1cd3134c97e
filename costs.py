"""What a plan costs: cache, parameters, bytes read per decode step, and FLOPs of prefill and training.

    python kv_router.py fusedkv --n_layer 8 --n_embd 512 --context 32768

Plain Python, so that drawing a plan stays instant. `lab.bench` prints measurements next to these predictions.
"""

from dataclasses import dataclass, fields

import cli
from cli import Parser, human, table
from kv_router import EXPLICIT, FAMILIES, Plan, PlanError


@dataclass(kw_only=True)
class Shape:
    """The sizes that costs depend on. Raises PlanError for sizes that no model can have.

    Zero stands for a default: n_kv_head = n_head, head_dim = n_embd / n_head, and n_hidden = 8/3 n_embd
    rounded up to a multiple of 32, which gives SwiGLU's three matrices the size of a plain MLP's two. Groups
    of layers that iterate do so `forward_passes` times without and `backward_passes` times with gradient."""

    vocab_size: int = 4096
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 128
    head_dim: int = 0
    n_hidden: int = 0
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    forward_passes: int = 7
    backward_passes: int = 2

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        can_be_zero = ("head_dim", "n_hidden", "forward_passes")
        for field in fields(Shape):
            value, low = getattr(self, field.name), int(field.name not in can_be_zero)
            if field.type is int and not low <= value < 1 << 31:
                raise PlanError(
                    f"{field.name} {value} is not valid; it must be {low} or more, and below 2**31"
                )
        if not self.head_dim and self.n_embd % self.n_head:
            raise PlanError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one or set head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or -(-self.n_embd * 8 // 3 // 32) * 32
        if self.head_dim < 2 or self.head_dim % 2:
            raise PlanError(
                f"head_dim {self.head_dim} is odd; RoPE rotates pairs of features, so it must be even"
            )
        if self.n_head % self.n_kv_head:
            raise PlanError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; change one of them"
            )


@dataclass(frozen=True)
class Costs:
    params: int  # parameters of a model built for the plan
    cache_bytes_per_token: int  # of one sequence, over all layers
    decode_bytes: int  # read per decode step: all weights once, and each layer's sources over the context
    prefill_flops: int  # of one prompt of `context` tokens, with early exit above plan.last_full_layer
    train_flops: int  # forward and backward over one sequence of `context` tokens


def costs(plan: Plan, shape: Shape, context: int = 8192, batch: int = 1, bytes_per_value: int = 2) -> Costs:
    """Predict a plan's costs with `context` tokens in each of `batch` sequences (Table 1 of arXiv 2512.03870,
    with the weights counted too). A multiply-add is two FLOPs; norms, RoPE and softmax are left out.

    A layer that fuses m sources reads all m of them at decode, where its gates are folded into query and
    output. Over a whole prompt it fuses first and then attends once. A group that iterates pays for every
    pass in training and, at most, in prefill; decode runs its layers once."""
    kv_width = shape.n_kv_head * shape.head_dim
    q_width = shape.n_head * shape.head_dim
    C, T = shape.n_embd, context

    # Each layer's parameters, and its FLOPs for one position: its own K and V, and everything else.
    params = 0
    kv_flops, other_flops, read_flops = [], [], []
    for i, route in enumerate(plan.routes):
        has_k, has_v = i in plan.k_layers, i in plan.v_layers
        kv_projections = (C + shape.qkv_bias) * kv_width * (has_k + has_v)
        other_matrices = (C + shape.qkv_bias) * q_width + q_width * C + 3 * C * shape.n_hidden
        k_gates = kv_width // 2 * len(route.k) if len(route.k) > 1 else 0  # one for two features, see RoPE
        v_gates = kv_width * len(route.v) if len(route.v) > 1 else 0
        norms = 2 * C + shape.qk_norm * shape.head_dim * (1 + has_k)
        params += kv_projections + other_matrices + k_gates + v_gates + norms
        kv_flops.append(2 * kv_projections)
        other_flops.append(2 * other_matrices)
        read_flops.append(2 * q_width * (len(route.k) + len(route.v)))  # per cached position, at decode
    embedding = shape.vocab_size * C
    params += C + embedding * (1 if shape.tie_embeddings else 2)

    attention = 4 * q_width * T * (T + 1) // 2  # causal: all T queries over one (fused) K and V
    prefill = 2 * embedding  # the logits of the last position
    train = 3 * 2 * embedding * T  # a backward costs two forwards
    for low, high in plan.segments:
        forward, backward = (shape.forward_passes, shape.backward_passes) if low < high else (0, 1)
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
    weights = params - (0 if shape.tie_embeddings else embedding)  # one row of the input table is read
    return Costs(
        params=params,
        cache_bytes_per_token=stored * bytes_per_value,
        decode_bytes=(weights + reads * context * batch) * bytes_per_value,
        prefill_flops=prefill,
        train_flops=train,
    )


def main():
    notations = [(notation, meaning) for notation, meaning, _ in FAMILIES.values()] + list(EXPLICIT.items())
    wide = max(len(notation) for notation, _ in notations)
    described = "\n".join(f"{notation:{wide}}  {meaning}" for notation, meaning in notations)
    parser = Parser(f"Draw a plan and print its costs.\n\n{described}")
    parser.add_argument("spec", metavar="SPEC", help="a plan, in the notation above")
    sizes = [field for field in fields(Shape) if field.type is int]
    for field in sizes:
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, help=f"[{field.default or 'derived'}]"
        )
    parser.add_argument("--context", type=int, default=8192, help="tokens per sequence [8192]")
    parser.add_argument("--batch", type=int, default=1, help="sequences [1]")
    parser.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="bytes per value [2, bf16]")
    args = parser.parse_args()
    for name in ("context", "batch"):
        if not 1 <= getattr(args, name) < 1 << 31:
            raise PlanError(
                f"--{name} {getattr(args, name)} is not valid; it must be 1 or more, and below 2**31"
            )
    shape = Shape(**{field.name: getattr(args, field.name) for field in sizes})
    plan = Plan.parse(args.spec, shape.n_layer)
    full = Plan.parse("full", shape.n_layer)

    canonical = "" if plan.spec == args.spec else f" ({plan.spec})"
    print(f"{args.spec}: {len(plan)} layers, {plan.cache_ratio:.1%} of the full cache{canonical}\n")
    print(plan.draw() + "\n")
    mine, whole = (costs(p, shape, args.context, args.batch, args.bytes) for p in (plan, full))
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
        passes = f"{shape.forward_passes} passes without and {shape.backward_passes} with gradient"
        print(f"\ncyclic: the iterated layers take {passes}; prefill stops sooner where their KV settles")


if __name__ == "__main__":
    cli.run(main)
