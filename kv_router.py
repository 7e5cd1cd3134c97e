"""Plans: which layers' keys and values each layer reads, what that costs, and how it looks.

    python kv_router.py fusedkv --n_layer 8

draws a plan and prints its costs. Everything here is plain Python; no tensors.

Layers are numbered from 0 (the bottom, next to the embeddings). K_i and V_i are layer i's own keys (after
RoPE) and values. A plan names, for every layer, whose K and whose V its queries read. A layer's K (or V) is
*stored* when some layer reads it: only stored tensors are computed, cached, and paid for.
"""

import argparse
import random
import re
from dataclasses import MISSING, dataclass, fields
from functools import cached_property


class PlanError(ValueError):
    """A plan that cannot be parsed, or that a model cannot run. The message is one line and names the fix."""


@dataclass(frozen=True)
class Route:
    """Whose keys and whose values one layer reads; more than one source means a learned fusion of them."""

    k: tuple[int, ...]
    v: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A route for every layer. Build one with `Plan.parse`; `plan[i]` is layer i's route.

    >>> Plan.parse("cla:2", 4).spec, Plan.parse("cla:2", 4).cache_ratio
    ('keep:0,2', 0.5)
    """

    routes: tuple[Route, ...]

    @classmethod
    def parse(cls, spec: str, n_layer: int) -> "Plan":
        """The plan that `spec` means for `n_layer` layers; `FAMILIES` below lists the notation.

        Raises PlanError, naming the spec, the offending part, the valid range and an example."""
        return cls(tuple(_parse(str(spec).strip(), n_layer)))

    def __getitem__(self, layer: int) -> Route:
        return self.routes[layer]

    def __len__(self) -> int:
        return len(self.routes)

    def __str__(self) -> str:
        return self.spec

    @cached_property
    def spec(self) -> str:
        """The canonical notation: equal plans have equal specs, and parsing it gives the plan back."""
        own = [i for i, r in enumerate(self.routes) if r == _own(i)]
        named = ["full", "shared-v", "fusedkv", "fusedkv-lite"] if len(self) > 1 else ["full"]
        if 0 in own:
            named.append("keep:" + ",".join(map(str, own)))
        for spec in named:
            if Plan.parse(spec, len(self)) == self:
                return spec
        return "_".join(_token(r) for r in self.routes)

    @cached_property
    def k_layers(self) -> tuple[int, ...]:
        """Layers whose keys are stored, ascending."""
        return tuple(sorted({j for r in self.routes for j in r.k}))

    @cached_property
    def v_layers(self) -> tuple[int, ...]:
        """Layers whose values are stored, ascending."""
        return tuple(sorted({j for r in self.routes for j in r.v}))

    @property
    def cache_ratio(self) -> float:
        """Stored K and V tensors over those of a cache that keeps every layer's."""
        return (len(self.k_layers) + len(self.v_layers)) / (2 * len(self))

    @property
    def cyclic(self) -> bool:
        """Whether some layer reads a layer above it (whose KV is computed later)."""
        return any(self.strict(i) for i in range(len(self)))

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """What runs in turn: (i, i) is a layer that runs once; (lo, hi), lo < hi, are layers bound by reads
        of higher layers, which iterate: from one that reads above itself up to the highest layer that any
        layer in between reads (arXiv 2410.14442)."""
        segments, lo = [], 0
        while lo < len(self):
            i = hi = lo
            while i <= hi:
                hi, i = max(hi, *self[i].k, *self[i].v), i + 1
            segments.append((lo, hi))
            lo = hi + 1
        return tuple(segments)

    def strict(self, layer: int) -> bool:
        """Whether a layer reads above itself, and so sees only the positions before its own."""
        return max(self[layer].k + self[layer].v) > layer

    @property
    def last_full_layer(self) -> int:
        """The highest layer that must see every prompt position: above it nothing is stored."""
        return max(self.k_layers[-1], self.v_layers[-1])

    def draw(self) -> str:
        """One row a layer, one column a source layer: `KV` marks a layer reading its own, `kv` another's,
        `k` and `v` apart where they come from different layers."""
        width = max(3, len(str(len(self) - 1)) + 1)
        lines = ["layer reads from" + "".join(f"{j:>{width}}" for j in range(len(self))) + "   stores"]
        iterated = {
            i: f"iterated {lo}-{hi}" for lo, hi in self.segments if lo < hi for i in range(lo, hi + 1)
        }
        for i in reversed(range(len(self))):
            cells = ""
            for j in range(len(self)):
                mark = "k" * (j in self[i].k) + "v" * (j in self[i].v) or "."
                cells += f"{mark.upper() if i == j else mark:>{width}}"
            stores = "K" * (i in self.k_layers) + "V" * (i in self.v_layers) or "-"
            notes = [iterated[i]] if i in iterated else []
            notes += ["<- last layer to see the whole prompt"] if i == self.last_full_layer else []
            lines.append(f"{i:>16}{cells}   {stores:6}   {'  '.join(notes)}".rstrip())
        return "\n".join(lines)


# --- notation ---------------------------------------------------------------------------------------------

FAMILIES = """\
full               every layer reads its own KV
keep:0,2,5         these layers keep their cache, every other reads the nearest kept layer below
cla:K              groups of K adjacent layers read the group's bottom layer (CLA)
yoco               the lower half own their KV, the upper half reads the last of them (YOCO)
pizza-bottom:l     l KV layers: l-1 own ones below, one group above them (l = half is YOCO)
sandwich-top:l     l KV layers: own layers below and above, one group between (top is LCKV)
lasagna-middle:l   l equal groups; each of the three takes -bottom, -middle or -top, the layer a group reads
shared-v           every layer reads its own K and layer 0's V
fusedkv            the upper half fuses the K and V of layer 0 and of the middle (FusedKV)
fusedkv-lite       the upper half reads the middle layer's K and layer 0's V (FusedKV-Lite)
0_0_2_2            explicit, one source layer per layer
0_1_k1v0_k0+1v0+1  explicit, K and V apart, + fuses"""

MAX_LAYERS = 1000  # far above any model's: a number in a file must not fill the memory
MAX_CONTEXT = 1 << 20  # tokens


def _own(i: int) -> Route:
    return Route((i,), (i,))


def _token(r: Route) -> str:
    if r.k == r.v and len(r.k) == 1:
        return str(r.k[0])
    return "k" + "+".join(map(str, r.k)) + "v" + "+".join(map(str, r.v))


def _read(sources: list[int]) -> list[Route]:
    return [_own(j) for j in sources]


def _parse(spec: str, n_layer: int) -> list[Route]:
    def fail(part, valid, example):
        raise PlanError(f"plan {spec!r} for {n_layer} layers: {part}; {valid}, for example {example}")

    def integer(text, low, high, what, example):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            fail(f"{what} {text!r} is not valid", f"valid are the whole numbers {low} to {high}", example)
        return int(text)

    def layer(text):
        return integer(text, 0, n_layer - 1, "layer", f"keep:0,{n_layer // 2}" if n_layer > 1 else "full")

    if not 1 <= n_layer <= MAX_LAYERS:
        fail(f"n_layer {n_layer} is not valid", f"a model has 1 to {MAX_LAYERS} layers", "--n_layer 8")
    name, _, arg = spec.partition(":")
    layers, half = list(range(n_layer)), n_layer // 2
    if spec in ("yoco", "fusedkv", "fusedkv-lite") and n_layer < 2:
        fail("there are no two halves", f"{spec} needs 2 layers at least", "full")

    if spec == "full":
        return _read(layers)
    if spec == "shared-v":
        return [Route((i,), (0,)) for i in layers]
    if spec == "yoco":
        return _read([min(i, half - 1) for i in layers])
    if spec == "fusedkv":
        both = tuple(sorted({0, half - 1}))
        return _read(layers[:half]) + [Route(both, both)] * (n_layer - half)
    if spec == "fusedkv-lite":
        return _read(layers[:half]) + [Route((half - 1,), (0,))] * (n_layer - half)
    if name == "cla":
        size = integer(arg, 1, n_layer, "group size", f"cla:{min(2, n_layer)}")
        return _read([i - i % size for i in layers])
    if name == "keep":
        kept = {layer(part) for part in arg.split(",")}
        if 0 not in kept:
            fail("layer 0 is not kept", "layer 0 has none below it to read and must be kept", "keep:0")
        return _read([max(j for j in kept if j <= i) for i in layers])
    if m := re.fullmatch(r"(pizza|sandwich|lasagna)-(bottom|middle|top)", name):
        n_kv = integer(arg, 1, n_layer, "number of KV layers", f"{name}:{max(half, 1)}")
        if m[1] == "lasagna":
            edges = [g * n_layer // n_kv for g in range(n_kv + 1)]
        else:  # own layers below and above are groups of one
            above = (n_kv - 1) // 2 if m[1] == "sandwich" else 0
            below = n_kv - 1 - above
            edges = layers[: below + 1] + [n_layer - a for a in reversed(range(above + 1))]
        sources = []
        for low, end in zip(edges, edges[1:]):
            high = end - 1
            target = {"bottom": low, "middle": (low + high) // 2, "top": high}[m[2]]
            sources += [target] * (end - low)
        return _read(sources)
    if re.match(r"[k0-9]", spec):
        routes = []
        for token in spec.split("_"):
            m = re.fullmatch(r"(?P<kv>[0-9]+)|k(?P<k>[0-9+]+)v(?P<v>[0-9+]+)", token)
            if not m:
                fail(
                    f"cannot read {token!r}",
                    "a layer's entry is N, or kNvN with + between fused layers",
                    "k1v0+1",
                )
            k, v = (
                tuple(sorted(layer(part) for part in (m["kv"] or group).split("+")))
                for group in (m["k"], m["v"])
            )
            if len(set(k)) < len(k) or len(set(v)) < len(v):
                fail(f"{token!r} names a layer twice", "a fusion takes different layers", "k0+1v0+1")
            routes.append(Route(k, v))
        if len(routes) != n_layer:
            fail(
                f"it has {len(routes)} entries", f"one per layer makes {n_layer}", "_".join(map(str, layers))
            )
        return routes
    fail("no such plan", "valid are " + ", ".join(f.split()[0] for f in FAMILIES.splitlines()), "cla:2")


# --- stochastic routing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StochasticRouter:
    """Random cross-layer attention (arXiv 2604.22782): the plan a training step runs under.

    Every layer i >= 1 keeps its own KV with probability 1 - p and otherwise reads that of a layer drawn
    uniformly from 0 .. i-1; with `above`, every layer does and draws from all others. `base` is the plan to
    start from: a layer follows its own route there, or that of the layer drawn. `plan(step)` is a pure
    function of (seed, step): a resumed run and every rank of a distributed one draw the same."""

    n_layer: int
    p: float
    seed: int = 0
    above: bool = False
    base: str = "full"

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise PlanError(f"router_p {self.p} is not a probability; valid are 0 to 1, for example 0.5")
        base = Plan.parse(self.base, self.n_layer)
        if base.cyclic or any(len(r.k + r.v) > 2 for r in base.routes):
            raise PlanError(
                f"router_p {self.p} draws among the routes of {self.base!r}, which iterates or fuses; "
                "valid are plans that do neither, for example full or shared-v"
            )

    def plan(self, step: int) -> Plan:
        rng = random.Random(f"{self.seed}:{step}")  # seeded by the string's SHA-512: the same everywhere
        base, routes = Plan.parse(self.base, self.n_layer), []
        for i in range(self.n_layer):
            others = [j for j in range(self.n_layer if self.above else i) if j != i]
            routes.append(base[rng.choice(others) if others and rng.random() < self.p else i])
        return Plan(tuple(routes))


# --- costs ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Shape:
    """The sizes that costs depend on. Zero means: n_kv_head = n_head, head_dim = n_embd / n_head,
    n_hidden = 8/3 n_embd rounded up to a multiple of 32 (SwiGLU at the size of a 4x MLP). Layers that iterate
    do so `forward_passes` times without and `backward_passes` times with gradient."""

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
        positive = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "backward_passes")
        for name in (*positive, "head_dim", "n_hidden", "forward_passes"):
            low, value = int(name in positive), getattr(self, name)
            if not low <= value < 1 << 31:
                raise PlanError(f"{name} {value} is not valid; it must be {low} or more, and below 2**31")
        if not self.head_dim and self.n_embd % self.n_head:
            raise PlanError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one or set head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or -(-self.n_embd * 8 // 3 // 32) * 32
        if self.head_dim < 2 or self.head_dim % 2:
            raise PlanError(
                f"head_dim {self.head_dim} is odd; RoPE turns pairs of features, so it must be even"
            )
        if self.n_head % self.n_kv_head:
            raise PlanError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; change one of them"
            )


@dataclass(frozen=True)
class Costs:
    """What a plan costs, as predicted; `bench.py` puts measurements beside it."""

    params: int  # parameters of a model built for the plan
    cache_bytes_per_token: int  # one sequence's, over all layers
    decode_bytes: int  # read per decode step: weights once, and each layer's sources over the context
    prefill_flops: int  # for one prompt of `context` tokens, with early exit above plan.last_full_layer
    train_flops: int  # forward and backward over one sequence of `context` tokens


def costs(plan: Plan, shape: Shape, context: int = 8192, batch: int = 1, bytes_per_value: int = 2) -> Costs:
    """Predict a plan's costs at `context` cached tokens per sequence (Table 1 of arXiv 2512.03870, with the
    weights counted too). A multiply-add is 2 FLOPs; norms, RoPE and softmax are left out.

    A layer that fuses m sources reads all m of them at decode (gates folded into query and output); over a
    whole prompt it fuses first and then attends once. Layers that iterate pay for every pass in training
    and, at most, in prefill; decode runs them once."""
    s, C, d = shape, shape.n_embd, shape.head_dim
    kv_width, q_width = s.n_kv_head * d, s.n_head * d
    stored_values = kv_width * (len(plan.k_layers) + len(plan.v_layers))  # per token

    params = 0
    kv, rest, row = [], [], []  # FLOPs of each layer: one position's own KV; its rest; one query's reads
    for i, route in enumerate(plan.routes):
        has_k, has_v = i in plan.k_layers, i in plan.v_layers
        own = (C + s.qkv_bias) * kv_width * (has_k + has_v)
        others = (C + s.qkv_bias) * q_width + q_width * C + 3 * C * s.n_hidden
        gates = sum(kv_width // half * len(g) for g, half in ((route.k, 2), (route.v, 1)) if len(g) > 1)
        params += own + others + gates + 2 * C + s.qk_norm * d * (1 + has_k)
        kv.append(2 * own)
        rest.append(2 * others)
        row.append(2 * q_width * (len(route.k) + len(route.v)))
    table = s.vocab_size * C
    params += C + table * (1 if s.tie_embeddings else 2)

    T = context
    attend = 4 * q_width * T * (T + 1) // 2  # causal attention of all T queries over one (fused) K and V
    prefill, train = 2 * table, 3 * 2 * table * T
    for lo, hi in plan.segments:
        one_pass = T * kv[hi] + sum(T * (kv[i] + rest[i]) + attend for i in range(lo, hi))
        m, b = (s.forward_passes, s.backward_passes) if lo < hi else (0, 1)
        train += (m + 3 * b) * one_pass + 3 * (T * rest[hi] + attend)  # a backward costs two forwards
        if hi < plan.last_full_layer:
            prefill += (m + b) * one_pass + T * rest[hi] + attend
        else:  # above the highest stored layer only the last position goes on
            prefill += ((m + b) * one_pass if hi == plan.last_full_layer else kv[hi]) + rest[hi] + T * row[hi]
    reads = sum(len(r.k) + len(r.v) for r in plan.routes) * kv_width * context * batch
    return Costs(
        params=params,
        cache_bytes_per_token=stored_values * bytes_per_value,
        decode_bytes=(params - (0 if s.tie_embeddings else table) + reads) * bytes_per_value,
        prefill_flops=prefill,
        train_flops=train,
    )


def check_size(shape: Shape, block_size: int, n_bytes: int) -> None:
    """Raise PlanError when a model read from a file of `n_bytes` would have more parameters than the file has
    bytes, or an absurd context: before anything is allocated, so that a header that lies fills no memory."""
    params = costs(Plan.parse(shape.plan, shape.n_layer), shape).params
    if params > n_bytes:
        raise PlanError(f"it asks for {human(params)} parameters and has {human(n_bytes, 'B')}")
    if not 1 <= block_size <= MAX_CONTEXT or block_size * shape.head_dim > 1 << 28:
        raise PlanError(f"block_size {block_size} is not valid; it must be 1 to {MAX_CONTEXT}")


def human(n: float, unit: str = "") -> str:
    """1536 -> '1.54 k'; powers of 1000, three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5 or prefix == "T":
            return f"{n:.3g} {prefix}{unit}".rstrip()
        n /= 1000


def main():
    parser = argparse.ArgumentParser(
        description="Draw a plan and print its costs.\n\n" + FAMILIES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that an error is one line
    )
    parser.add_argument("spec", metavar="SPEC", help="a plan, in the notation above")
    for f in fields(Shape):
        if f.type is int and f.default is not MISSING:
            parser.add_argument(
                f"--{f.name}", type=int, default=f.default, help=f"default {f.default or 'derived'}"
            )
    parser.add_argument("--context", type=int, default=8192, help="tokens per sequence, default 8192")
    parser.add_argument("--batch", type=int, default=1, help="sequences, default 1")
    parser.add_argument(
        "--bytes", type=int, default=2, choices=(1, 2, 4), help="bytes per value, default 2 (bf16)"
    )
    args = parser.parse_args()
    try:
        if not 1 <= min(args.context, args.batch) <= max(args.context, args.batch) < 1 << 31:
            raise PlanError("--context and --batch must be 1 or more, and below 2**31")
        shape = Shape(**{f.name: getattr(args, f.name) for f in fields(Shape) if hasattr(args, f.name)})
        plan, full = (Plan.parse(spec, shape.n_layer) for spec in (args.spec, "full"))
    except PlanError as e:
        parser.error(str(e))
    a, b = (costs(p, shape, args.context, args.batch, args.bytes) for p in (plan, full))
    print(f"{args.spec}: {len(plan)} layers, {plan.cache_ratio:.1%} of the full cache", end="")
    print("" if plan.spec == args.spec else f" ({plan.spec})")
    print("\n" + plan.draw() + "\n")
    total = args.context * args.batch
    rows = [
        ("parameters", a.params, b.params, ""),
        ("cache per token", a.cache_bytes_per_token, b.cache_bytes_per_token, "B"),
        ("cache in all", a.cache_bytes_per_token * total, b.cache_bytes_per_token * total, "B"),
        ("read per decode step", a.decode_bytes, b.decode_bytes, "B"),
        ("prefill of one prompt", a.prefill_flops, b.prefill_flops, "FLOP"),
        ("training on one", a.train_flops, b.train_flops, "FLOP"),
    ]
    print(f"{f'{args.context} tokens x {args.batch}':24}{'this plan':>12}{'full':>12}{'ratio':>8}")
    for name, x, y, unit in rows:
        print(f"{name:24}{human(x, unit):>12}{human(y, unit):>12}{x / y:>8.3f}")
    if plan.cyclic:
        passes = f"{shape.forward_passes} passes without and {shape.backward_passes} with gradient"
        print(f"\ncyclic: the iterated layers take {passes}; prefill stops sooner where their KV settles")


if __name__ == "__main__":
    main()
