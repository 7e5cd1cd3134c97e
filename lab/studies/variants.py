"""What a study changes in the program, and passes to it: rules of drawing and kinds of model.

    python -m lab.studies train kept config/demo.toml --router_p=0.5 --out_dir=out/kept

trains with one of VARIANTS. A rule is a function that draws the routes of one training step, see
kv_router.Rule; a kind of model is a class derived from GPT."""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kv_router import Plan, Route, uniform_below
from model import GPT, Attention, Rope
from sweep import sharing, spread

# --- rules of drawing -------------------------------------------------------------------------------------


def bottom_v(rng: random.Random, base: Plan, p: float, step: int) -> list[Route]:
    """The paper's rule for K; a layer that reads another's K reads V of layer 0."""
    routes = uniform_below(rng, base, p, step)
    return [route if route == base[i] else Route(route.k, (0,)) for i, route in enumerate(routes)]


def apart(rng: random.Random, base: Plan, p: float, step: int) -> list[Route]:
    """K of a lower layer, and V of layer 0, each with a chance of its own."""
    routes = []
    for i in range(len(base)):
        k = rng.randrange(i) if i > 0 and rng.random() < p else i
        v = 0 if i > 0 and rng.random() < p else i
        routes.append(Route((k,), (v,)))
    return routes


def kept(rng: random.Random, base: Plan, p: float, step: int, v_of_bottom: bool = False) -> list[Route]:
    """As in deployment: a layer that is not kept reads the nearest kept one below, or with `v_of_bottom`
    its K and V of layer 0. How many layers are kept is spread evenly: at p = 0.5, from one to all."""
    p = rng.uniform(0, 2 * p)
    routes, nearest = [], 0
    for i in range(len(base)):
        is_kept = i == 0 or rng.random() >= p
        nearest = i if is_kept else nearest
        routes.append(Route((nearest,), (0,)) if v_of_bottom and not is_kept else base[nearest])
    return routes


def alternate(rng: random.Random, base: Plan, p: float, step: int, rule=uniform_below) -> list[Route]:
    """A rule and the full plan in turn."""
    return rule(rng, base, p if step % 2 else 0.0, step)


def ramp(rng: random.Random, base: Plan, p: float, step: int) -> list[Route]:
    """The paper's rule, with p growing from 0 over the first 200 draws."""
    return uniform_below(rng, base, p * min(1, step / 200), step)


def falling(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """The paper's rule, with p falling to 0 over 600 draws."""
    return uniform_below(rng, base, p * max(0, 1 - step / 600), step, lowest)


def rising(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """The paper's rule, with p growing from 0 over 600 draws."""
    return uniform_below(rng, base, p * min(1, step / 600), step, lowest)


def rungs(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """With a chance of p one of the plans that a sweep deploys: a number of evenly spread kept layers,
    drawn evenly."""
    n = len(base)
    n_kept = rng.randint(1 + lowest, n) if rng.random() < p else n
    return list(sharing(base, spread(n, n_kept, lowest)).routes)


# --- kinds of model ---------------------------------------------------------------------------------------


class Distilled(GPT):
    """Trains the full plan on the text, and the drawn plan on what the full one predicts, in the same step:
    twice the work."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, plan=None, cache=None):
        if plan is None or not torch.is_grad_enabled():
            return super().forward(idx, targets, plan, cache)
        hidden = (self.norm(self.hidden(idx, p)) for p in (self.plan, plan))
        teacher, student = (self.lm_head(x).flatten(0, 1) for x in hidden)
        divergence = F.kl_div(
            student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="batchmean", log_target=True
        )
        return None, F.cross_entropy(teacher, targets.flatten()) + divergence


class ValueResidual(GPT):
    """Every layer's V is a learned mixture of its own and that of layer 0, which starts even."""

    def __init__(self, config):
        super().__init__(config)
        self.mixture = torch.nn.Parameter(torch.full((config.n_layer,), 0.5))

    def project(self, i: int, x: Tensor, kv, need_q: bool = True):
        q = super().project(i, x, kv, need_q)
        if i > 0 and kv.v[i] is not None:
            kv.put(i, kv.k[i], torch.lerp(kv.v[i], kv.v[0], self.mixture[i].type_as(kv.v[0])))
        return q


class UntiedAttention(Attention):
    """A key gate for every feature, also for the two that RoPE rotates together."""

    def new_gate(self, sources: tuple[int, ...], start: int, width: int):
        return super().new_gate(sources, start, self.head_dim)

    def forward(self, q: Tensor, ks, vs, past_only: bool, seen=None) -> Tensor:
        k, v = kernels.fuse(ks, self.k_gate), kernels.fuse(vs, self.v_gate)
        return self.o_proj(kernels.attention(q, [k], [v]).transpose(1, 2).flatten(2))


class BeforeRopeAttention(UntiedAttention):
    """Keys are fused first and rotated then; the cache would hold keys before RoPE."""

    def project(self, h: Tensor, rope: Rope, need_q: bool, need_k: bool, need_v: bool):
        self.rope = rope
        q, _, v = super().project(h, rope, need_q, False, need_v)
        return q, self.heads(self.k_proj(h)) if need_k else None, v

    def forward(self, q: Tensor, ks, vs, past_only: bool, seen=None) -> Tensor:
        k = kernels.rotate(kernels.fuse(ks, self.k_gate), *self.rope)
        y = kernels.attention(q, [k], [kernels.fuse(vs, self.v_gate)])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class EvenAttention(Attention):
    """Gates that start even over their sources."""

    def new_gate(self, sources: tuple[int, ...], start: int, width: int):
        gate = super().new_gate(sources, start, width)
        return gate if gate is None else torch.nn.Parameter(torch.full_like(gate, 1 / len(sources)))


class Untied(GPT):
    attention = UntiedAttention


class BeforeRope(GPT):
    attention = BeforeRopeAttention


class Even(GPT):
    attention = EvenAttention


VARIANTS = {  # name -> arguments of train.main
    "bottom-v": {"rule": bottom_v},
    "apart": {"rule": apart},
    "kept": {"rule": kept},
    "kept-bottom-v": {"rule": partial(kept, v_of_bottom=True)},
    "alternate": {"rule": alternate},
    "alternate-bottom-v": {"rule": partial(alternate, rule=bottom_v)},
    "ramp": {"rule": ramp},
    "falling": {"rule": falling},
    "rising": {"rule": rising},
    "rungs": {"rule": rungs},
    "value-residual": {"model_class": ValueResidual},
    "distilled": {"model_class": Distilled},
    "untied": {"model_class": Untied},
    "before-rope": {"model_class": BeforeRope},
    "even": {"model_class": Even},
}
