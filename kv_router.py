"""Plans: which layers' keys and values each layer reads, how they are written down, and how they are drawn.

    python kv_router.py fusedkv --n_layer 8

draws a plan and prints what it costs. This file is plain Python: no tensors, and nothing else of the project.

Layers are numbered from 0, the one next to the embeddings. K_i and V_i are layer i's own keys (after RoPE)
and values. A plan names, for every layer, whose K and whose V its queries read. A layer's K (or V) is
*stored* when some layer reads it: only stored tensors are computed, cached and paid for."""

import difflib
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial


class PlanError(ValueError):
    """A plan that cannot be parsed, or that a model cannot run. The message is one line and names the fix."""


@dataclass(frozen=True)
class Route:
    """Whose keys and whose values one layer reads. More than one source means a learned fusion of them."""

    k: tuple[int, ...]
    v: tuple[int, ...]

    @classmethod
    def of(cls, layer: int) -> "Route":
        """Read K and V of one layer."""
        return cls((layer,), (layer,))


@dataclass(frozen=True)
class Plan:
    """A route for every layer. Build one with `Plan.parse`; `plan[i]` is layer i's route.

    >>> Plan.parse("cla:2", 4).spec, Plan.parse("cla:2", 4).cache_ratio
    ('keep:0,2', 0.5)
    """

    routes: tuple[Route, ...]

    @classmethod
    def parse(cls, spec: str, n_layer: int) -> "Plan":
        """The plan that `spec` means for `n_layer` layers; `python kv_router.py --help` lists the notation.

        Raises PlanError, which names the spec, the offending part, the valid range and an example."""
        spec = str(spec).strip()
        try:
            return cls(tuple(parse_routes(spec, n_layer)))
        except PlanError as e:
            raise PlanError(f"plan {quoted(spec)} for {n_layer} layers: {e}") from None

    def __getitem__(self, layer: int) -> Route:
        return self.routes[layer]

    def __len__(self) -> int:
        return len(self.routes)

    def __str__(self) -> str:
        return self.spec

    @cached_property
    def spec(self) -> str:
        """The canonical notation: equal plans have equal specs, and parsing one gives the plan back."""
        kept = [i for i, route in enumerate(self.routes) if route == Route.of(i)]
        keep = "keep:" + ",".join(map(str, kept))
        for spec in ("full", keep, "shared-v", "fusedkv", "fusedkv-lite"):
            try:
                if Plan.parse(spec, len(self)) == self:
                    return spec
            except PlanError:  # `keep:` without layer 0, halves of a single layer
                continue
        return "_".join(map(route_spec, self.routes))

    @cached_property
    def k_layers(self) -> tuple[int, ...]:
        """Layers whose keys are stored, ascending."""
        return tuple(sorted({j for route in self.routes for j in route.k}))

    @cached_property
    def v_layers(self) -> tuple[int, ...]:
        """Layers whose values are stored, ascending."""
        return tuple(sorted({j for route in self.routes for j in route.v}))

    @property
    def cache_ratio(self) -> float:
        """The number of stored K and V tensors over that of a cache that keeps every layer's."""
        return (len(self.k_layers) + len(self.v_layers)) / (2 * len(self))

    @property
    def last_full_layer(self) -> int:
        """The highest layer that must see every prompt position, because nothing is stored above it."""
        return max(self.k_layers[-1], self.v_layers[-1])

    def reads_above(self, layer: int) -> bool:
        """Whether a layer reads one above it, whose KV is computed later. Such a layer can see only the
        positions before its own (arXiv 2410.14442)."""
        return max(self[layer].k + self[layer].v) > layer

    @property
    def cyclic(self) -> bool:
        """Whether any layer reads one above it."""
        return any(self.reads_above(i) for i in range(len(self)))

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The layers in the order in which they run, as pairs (lowest, highest).

        (i, i) is a layer that runs once. A longer segment iterates, since layers in it read above themselves:
        it grows until none reads beyond its top (arXiv 2410.14442).

        >>> Plan.parse("sandwich-top:3", 8).segments
        ((0, 0), (1, 6), (7, 7))
        """
        segments = []
        low = 0
        while low < len(self):
            i = high = low
            while i <= high:
                high = max(high, *self[i].k, *self[i].v)
                i += 1
            segments.append((low, high))
            low = high + 1
        return tuple(segments)


# --- notation ---------------------------------------------------------------------------------------------
# A family is a function that returns the routes of n_layer layers. What stands after the colon of its
# notation is its argument, as text. To add one, write such a function and decorate it; nothing else needs
# to change.

MAX_LAYERS = 1000  # far above any model: a damaged file must not make us allocate without bound

FAMILIES: dict[str, tuple[str, str, Callable[..., list[Route]]]] = {}  # name -> notation, meaning, function


def family(notation: str, meaning: str):
    """Register the decorated function as the plan family that `notation` shows."""

    def register(build: Callable[..., list[Route]]):
        FAMILIES[notation.partition(":")[0]] = notation, meaning, build
        return build

    return register


def read_from(sources: Iterable[int]) -> list[Route]:
    """The routes of layers that each read K and V of one source layer."""
    return [Route.of(j) for j in sources]


def lower_half(n_layer: int) -> int:
    """The number of layers in the lower half."""
    if n_layer < 2:
        raise PlanError("there are no two halves; this plan needs 2 layers or more, for example full")
    return n_layer // 2


@family("full", "every layer reads its own KV")
def full(n_layer: int) -> list[Route]:
    """An ordinary transformer."""
    return read_from(range(n_layer))


@family("keep:0,2,5", "these layers keep their cache, every other reads the nearest kept layer below")
def keep(n_layer: int, layers: str) -> list[Route]:
    """What the papers deploy after stochastic training (arXiv 2604.22782)."""
    kept = {layer_number(part, n_layer) for part in layers.split(",")}
    if 0 not in kept:
        raise PlanError("layer 0 is not kept; it has none below it to read, for example keep:0")
    return read_from(max(j for j in kept if j <= i) for i in range(n_layer))


@family("cla:K", "groups of K adjacent layers read the group's bottom layer (CLA)")
def cla(n_layer: int, group_size: str) -> list[Route]:
    """Cross-layer attention (arXiv 2405.12981)."""
    size = whole_number(group_size, 1, n_layer, "group size", f"cla:{min(2, n_layer)}")
    return read_from(i - i % size for i in range(n_layer))


@family("yoco", "the lower half own their KV, the upper half reads the last of them (YOCO)")
def yoco(n_layer: int) -> list[Route]:
    """The sharing pattern of You Only Cache Once (arXiv 2405.05254), whose lower half is not plain
    attention."""
    half = lower_half(n_layer)
    return read_from(min(i, half - 1) for i in range(n_layer))


@family("shared-v", "every layer reads its own K and layer 0's V (SVFormer)")
def shared_v(n_layer: int) -> list[Route]:
    """The sharing pattern of SVFormer (arXiv 2410.17897)."""
    return [Route((i,), (0,)) for i in range(n_layer)]


@family("fusedkv", "the upper half fuses the K and V of layer 0 and of the middle (FusedKV)")
def fusedkv(n_layer: int) -> list[Route]:
    """Section 3 of arXiv 2512.03870: n = n_layer // 2 storage layers, with sources 0 and n - 1 for the
    others."""
    half = lower_half(n_layer)
    bottom_and_middle = tuple(sorted({0, half - 1}))
    return read_from(range(half)) + [Route(bottom_and_middle, bottom_and_middle)] * (n_layer - half)


@family("fusedkv-lite", "the upper half reads the middle layer's K and layer 0's V (FusedKV-Lite)")
def fusedkv_lite(n_layer: int) -> list[Route]:
    """The same without gates: nothing is learned, and nothing read but one K and one V."""
    half = lower_half(n_layer)
    return read_from(range(half)) + [Route((half - 1,), (0,))] * (n_layer - half)


def unified(shape: str, target: str, n_layer: int, n_kv_layers: str) -> list[Route]:
    """One of the nine configurations of arXiv 2410.14442. The layers are cut into groups, and one target
    layer's KV serves its whole group. A group of one layer is a layer that reads its own."""
    n_kv = whole_number(
        n_kv_layers, 1, n_layer, "number of KV layers", f"{shape}-{target}:{n_layer // 2 or 1}"
    )
    if shape == "lasagna":
        starts = [group * n_layer // n_kv for group in range(n_kv)]
    else:
        singles_above = (n_kv - 1) // 2 if shape == "sandwich" else 0
        singles_below = n_kv - 1 - singles_above
        starts = [*range(singles_below + 1), *range(n_layer - singles_above, n_layer)]
    sources = []
    for low, end in zip(starts, [*starts[1:], n_layer]):
        high = end - 1
        source = {"bottom": low, "middle": (low + high) // 2, "top": high}[target]
        sources += [source] * (end - low)
    return read_from(sources)


SHAPES = {
    "pizza": "single layers below, one group above; l KV layers",
    "sandwich": "single layers below and above, one group between; l KV layers",
    "lasagna": "l equal groups",
}
KNOWN = {"pizza-bottom": " (YOCO)", "sandwich-top": " (LCKV)", "lasagna-bottom": " (CLA)"}
for _shape, _meaning in SHAPES.items():
    for _target in ("bottom", "middle", "top"):
        _name = f"{_shape}-{_target}"
        _help = f"{_meaning}; each group reads its {_target} layer{KNOWN.get(_name, '')}"
        family(f"{_name}:l", _help)(partial(unified, _shape, _target))

EXPLICIT = {
    "0_0_2_2": "explicit, one source layer per layer",
    "0_1_k1v0_k0+1v0+1": "explicit, keys and values apart; + fuses",
}


def route_spec(route: Route) -> str:
    """A layer's entry in the explicit notation."""
    if route.k == route.v and len(route.k) == 1:
        return str(route.k[0])
    return "k" + "+".join(map(str, route.k)) + "v" + "+".join(map(str, route.v))


def explicit(n_layer: int, spec: str) -> list[Route]:
    """The routes of a plan that names every layer's sources, such as 0_1_k1v0_k0+1v0+1."""
    routes = []
    for text in spec.split("_"):
        match = re.fullmatch(r"([0-9]+)|k([0-9+]+)v([0-9+]+)", text)
        if not match:
            entries = "a layer's entry is N, or kNvN with + between fused layers"
            raise PlanError(f"cannot read {quoted(text)}; {entries}, for example k1v0+1")
        both, k, v = match.groups()
        sources = []
        for group in (both or k, both or v):
            layers = sorted(layer_number(part, n_layer) for part in group.split("+"))
            if len(set(layers)) < len(layers):
                valid = "a fusion takes different layers, for example k0+1v0+1"
                raise PlanError(f"{quoted(text)} names a layer twice; {valid}")
            sources.append(tuple(layers))
        routes.append(Route(*sources))
    if len(routes) != n_layer:
        example = quoted("_".join(map(str, range(n_layer))))
        raise PlanError(
            f"it has {len(routes)} entries; it needs {n_layer}, one per layer, for example {example}"
        )
    return routes


def parse_routes(spec: str, n_layer: int) -> list[Route]:
    """The routes that a notation means. PlanError, which lists the valid ones, where it means nothing."""
    if not 1 <= n_layer <= MAX_LAYERS:
        raise PlanError(
            f"n_layer {n_layer} is not valid; a model has 1 to {MAX_LAYERS} layers, for example 8"
        )
    name, colon, argument = spec.partition(":")
    if name in FAMILIES:
        notation, _, build = FAMILIES[name]
        if ":" in notation:
            return build(n_layer, argument)
        if not colon:
            return build(n_layer)
    elif re.match(r"k?[0-9]", spec):
        return explicit(n_layer, spec)
    valid = [notation for notation, _, _ in FAMILIES.values()] + list(EXPLICIT)
    close = difflib.get_close_matches(name.replace("_", "-"), FAMILIES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if "," in name:
        hint = "; separate plans by spaces"
    raise PlanError(f"no such plan{hint}; valid are {', '.join(valid)}, for example cla:2")


def whole_number(text: str, low: int, high: int, what: str, example: str) -> int:
    """The number in `text`; PlanError unless it is one of low .. high."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        valid = f"valid are the whole numbers {low} to {high}"
        raise PlanError(f"{what} {quoted(text)} is not valid; {valid}, for example {example}")
    return int(text)


def layer_number(text: str, n_layer: int) -> int:
    example = f"keep:0,{n_layer // 2}" if n_layer > 1 else "full"
    return whole_number(text, 0, n_layer - 1, "layer", example)


def quoted(text: str) -> str:
    """What a user wrote, for an error message: in quotes, and cut where it is long."""
    shown = repr(text)
    return shown if len(shown) <= 50 else shown[:47] + "..."


# --- stochastic routing -----------------------------------------------------------------------------------


def uniform_below(rng: random.Random, base: Plan, p: float, lowest: int = 0) -> list[Route]:
    """Draw the routes of one batch by the rule of arXiv 2604.22782: layer i >= 1 keeps its own route,
    base[i], with probability 1 - p, and otherwise takes base[j], with j uniform in 0 .. i-1. Layer 0 keeps
    its own.

    `lowest` is ours: j starts there. With 1, no layer above reads K of layer 0, which has seen nothing but
    its own token."""
    routes = []
    for i in range(len(base)):
        routed = i > lowest and rng.random() < p
        routes.append(base[rng.randrange(lowest, i) if routed else i])
    return routes


@dataclass(frozen=True)
class StochasticRouter:
    """Random cross-layer attention (arXiv 2604.22782): the plan that each training batch runs under.

    `base` is the plan whose routes are drawn from, `lowest` the lowest layer that others are routed to, and
    `rule` how routes are drawn. `plan` is a pure function of the seed and the number of the batch, so a
    resumed run and every rank of a distributed one draw the same plans. Raises PlanError if p is not within
    0 to 1, or the base iterates or fuses."""

    n_layer: int
    p: float
    seed: int = 0
    base: str = "full"
    lowest: int = 0
    rule: Callable[[random.Random, Plan, float, int], list[Route]] = uniform_below

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise PlanError(f"router_p {self.p} is not a probability; valid are 0 to 1, for example 0.5")
        if self.base_plan.cyclic or any(max(len(r.k), len(r.v)) > 1 for r in self.base_plan.routes):
            raise PlanError(
                f"router_p {self.p} draws among the routes of {self.base!r}, which iterates or fuses; "
                "valid are plans that do neither, for example full or shared-v"
            )

    @cached_property
    def base_plan(self) -> Plan:
        return Plan.parse(self.base, self.n_layer)

    def plan(self, batch: int) -> Plan:
        """The plan of a training batch (a micro-step), by its number."""
        rng = random.Random(f"{self.seed}:{batch}")  # a text as seed gives the same draws on every machine
        return Plan(tuple(self.rule(rng, self.base_plan, self.p, self.lowest)))


if __name__ == "__main__":
    import runpy

    runpy.run_module("support.costs", run_name="__main__")  # which draws plans, and prints what they cost
