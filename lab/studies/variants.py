"""What a study changes in the program, and passes to it: rules of drawing and kinds of model.

    python -m lab.studies train falling config/demo.toml --router_p=0.5 --out_dir=out/falling

trains with one of VARIANTS. A rule is a function that draws the routes of one training step, see
kv_router.Rule; a kind of model is a class derived from GPT."""

import random

import torch
from torch import Tensor

import kernels
from kv_router import Plan, Route, uniform_below
from model import GPT, Attention, Rope
from sweep import sharing, spread

STEPS = 600  # over which `falling` and `rising` change p: those of most studies

# --- rules of drawing -------------------------------------------------------------------------------------


def falling(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """The paper's rule, with p falling to 0 over STEPS draws."""
    return uniform_below(rng, base, p * max(0, 1 - step / STEPS), step, lowest)


def rising(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """The paper's rule, with p growing from 0 over STEPS draws."""
    return uniform_below(rng, base, p * min(1, step / STEPS), step, lowest)


def rungs(rng: random.Random, base: Plan, p: float, step: int, lowest: int = 0) -> list[Route]:
    """With a chance of p one of the plans that a sweep deploys: a number of evenly spread kept layers,
    drawn evenly."""
    n = len(base)
    n_kept = rng.randint(1 + lowest, n) if rng.random() < p else n
    return list(sharing(base, spread(n, n_kept, lowest)).routes)


# --- kinds of model ---------------------------------------------------------------------------------------


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
    "falling": {"rule": falling},
    "rising": {"rule": rising},
    "rungs": {"rule": rungs},
    "value-residual": {"model_class": ValueResidual},
    "untied": {"model_class": Untied},
    "before-rope": {"model_class": BeforeRope},
    "even": {"model_class": Even},
}
