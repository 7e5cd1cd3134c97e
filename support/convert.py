"""A pretrained model under a plan that it was not trained for, in minutes and without training.

`convert` moves the weights, and leaves out the projections that no layer reads any more. What is left then
computes something else: layers that read another's K or V add the wrong thing to the residual stream, and
those above go astray. `fit` puts that right over some windows of text, which run through the original and the
new model side by side."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import data
import kernels
from kv_router import Plan, PlanError, Route
from model import GPT, KV
from support.cli import Progress, UserError
from support.hf import OWN, check_tokenizer, load_hf

import torch
import torch.nn as nn
from torch import Tensor

CHUNK = 4  # windows that run together, which bounds memory
RIDGE = 0.15  # how strongly weights are pulled to the old ones
STEPS, LEARNING_RATE = 30, 3e-3  # of Adam, for queries and gates


def pretrained(folder: str, config, corpus: data.Tokens, fit_tokens: int, device: str) -> GPT:
    """The model in a Hugging Face folder with the context, plan and passes of `config`, fitted to that plan
    on `fit_tokens` tokens of the corpus. UserError where these are of another tokenizer, or the plan is
    cyclic."""
    original = load_hf(folder, config.block_size).to(device)
    check_tokenizer(folder, original, corpus.path.parent)
    model = convert(original, config.plan, **{name: getattr(config, name) for name in OWN - {"plan"}})
    if fit_tokens and model.plan.spec != original.plan.spec:
        if model.plan.cyclic:
            raise UserError(f"--plan {model.plan} is cyclic, which cannot be fitted; say --fit_tokens=0")
        n = -(-fit_tokens // config.block_size)
        fit(model, original, corpus.batch(0, n, seed=0)[0].to(device))
    return model


@torch.no_grad()
def convert(model: GPT, plan: str, **changes) -> GPT:
    """A model built for `plan` with the weights of `model`, without the projections that no layer reads any
    more; gates start as in a new model. PlanError where `model` lacks what the plan reads."""
    plan = Plan.parse(plan, model.config.n_layer)
    config = replace(model.config, **changes | {"plan": plan.spec})
    with torch.device(model.embed.weight.device):
        new = GPT(config).to(model.embed.weight.dtype)
    weights = model.state_dict()
    have = {name: p for name, p in new.state_dict().items()}
    if lacking := [name for name in have if name not in weights and not name.endswith("_gate")]:
        model.resolve(plan)  # says which layer reads what
        raise PlanError(f"plan {plan.spec!r} needs {lacking[0]}, which the model does not have")
    new.load_state_dict({name: weights.get(name, p) for name, p in have.items()})
    return new.eval()


class Side:
    """One of the two models at work on windows of text, which are cut into chunks: the residual stream
    (CHUNK, T, C) of each, and its keys and values."""

    def __init__(self, model: GPT, idx: Tensor):
        self.model, self.streams = model, [model.embed(part) for part in idx.split(CHUNK)]
        self.kvs = [KV(model.plan) for _ in self.streams]
        for kv in self.kvs:
            kv.rope = model.rope(slice(idx.size(1)))

    def attend(self, i: int, n: int) -> Tensor:
        """What attention of layer i adds to the stream of chunk n."""
        q = self.model.project(i, self.streams[n], self.kvs[n])
        return self.model.blocks[i].attn(q, self.kvs[n].sources(i), past_only=False, seen=None)

    def think(self, i: int, n: int) -> Tensor:
        """What the MLP of layer i adds to it."""
        block = self.model.blocks[i]
        return block.mlp(block.norm2(self.streams[n]))

    def add(self, half: Callable, i: int) -> None:
        for n in range(len(self.streams)):
            self.streams[n] = self.streams[n] + half(i, n)

    def forget(self, i: int) -> None:
        """Drop the keys and values that no layer above i reads."""
        routes = self.model.plan.routes[i + 1 :]
        for kv in self.kvs:
            kv.k = {j: k for j, k in kv.k.items() if any(j in route.k for route in routes)}
            kv.v = {j: v for j, v in kv.v.items() if any(j in route.v for route in routes)}


@torch.no_grad()
def fit(model: GPT, original: GPT, idx: Tensor) -> list[float]:
    """Change the weights of `model`, which `convert` made, so that its residual stream over the token ids idx
    (n, T) comes close to that of the `original`. From the lowest layer that reads another's K or V upwards,
    every half layer (attention, MLP) has a goal: the original's stream after it, less the new model's before
    it. The last matrix of the half layer is refitted to that in closed form; where attention reads another
    layer, then its queries and gates are, by gradient descent, and the matrix once more.

    Returns which share of its goal the attention of each layer misses. The same text gives the same
    weights."""
    theirs, ours = Side(original, idx), Side(model, idx)
    missed, changed, progress = [], False, Progress("fitting", len(model.blocks))
    for i, (block, route) in enumerate(zip(model.blocks, model.plan.routes)):
        changed = changed or route != Route.of(i)
        for their_half, our_half, last in (
            (theirs.attend, ours.attend, block.attn.o_proj),
            (theirs.think, ours.think, block.mlp.down_proj),
        ):
            theirs.add(their_half, i)
            goals = Goals(theirs, ours, partial(our_half, i))
            if changed:
                refit(last, goals)
            if last is block.attn.o_proj:
                if route != Route.of(i):
                    attn = block.attn
                    descend(
                        [p for p in (attn.q_proj.weight, attn.k_gate, attn.v_gate) if p is not None], goals
                    )
                    refit(last, goals)
                missed.append(goals.missed())
            ours.add(our_half, i)
        theirs.forget(i)
        ours.forget(i)
        progress(i + 1, f"layer {i} misses {missed[i]:.0%} of its goal")
    progress.close()
    return missed


class Goals:
    """What a half layer of the new model is to add to the residual stream of each chunk. All positions count
    alike: differences are divided by the size of the original's stream there, as the next norm does."""

    def __init__(self, theirs: Side, ours: Side, half: Callable[[int], Tensor]):
        self.half = half  # half(n) is what it adds now to chunk n, (CHUNK, T, C)
        self.wanted = [a - b for a, b in zip(theirs.streams, ours.streams)]
        self.scales = [x.square().mean(-1, keepdim=True).rsqrt() for x in theirs.streams]  # (CHUNK, T, 1)

    def error(self, n: int) -> Tensor:
        """What is missing in chunk n, (CHUNK, T, C)."""
        return (self.wanted[n] - self.half(n)) * self.scales[n]

    def missed(self) -> float:
        """The share of the goals that is missed."""
        chunks = range(len(self.wanted))
        whole = sum((self.wanted[n] * self.scales[n]).square().sum() for n in chunks)
        return float(sum(self.error(n).square().sum() for n in chunks) / whole)


def refit(linear: nn.Linear, goals: Goals) -> None:
    """Set the last matrix of a half layer, which maps a (.., m) to its output, by a ridge regression that
    pulls to the old weights:

        W = argmin |a W^T - goal|^2 + r |W - W_old|^2        r = RIDGE * mean diag(a^T a)"""
    inputs = []
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    gram = cross = 0
    for n, scale in enumerate(goals.scales):
        error = goals.error(n).flatten(0, 1)
        a = (inputs.pop() * scale).flatten(0, 1)
        gram, cross = gram + a.T @ a, cross + a.T @ error
    hook.remove()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    linear.weight += torch.linalg.solve(gram, cross).T


def descend(parameters: list[nn.Parameter], goals: Goals) -> None:
    """Lower the squared error of a half layer by STEPS steps of Adam, a chunk each."""
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for step in range(STEPS):
        with torch.enable_grad():
            loss = goals.error(step % len(goals.scales)).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- which layers should share ----------------------------------------------------------------------------


@torch.no_grad()
def reading_errors(model: GPT, idx: Tensor) -> dict[tuple[int, str, int], float]:
    """What it would cost every layer to read K ("k") or V ("v") of a layer below in place of its own, over
    the token ids idx (n, T). By (layer, kind, source): how much attention then adds wrongly after its output
    projection was refitted, as a share of the residual stream."""
    side = Side(model, idx)
    errors, progress = {}, Progress("comparing layers", len(model.blocks) ** 2)
    for i in range(len(model.blocks)):
        added = [side.attend(i, n) for n in range(len(side.streams))]
        queries = [model.project(i, x, kv) for x, kv in zip(side.streams, side.kvs)]
        for j in range(i):
            for kind, ks, vs in (("k", j, i), ("v", i, j)):
                gram = cross = whole = 0
                for q, kv, y, x in zip(queries, side.kvs, added, side.streams):
                    scale = x.square().mean(-1, keepdim=True).rsqrt()
                    a = kernels.attention(q, [kv.k[ks]], [kv.v[vs]]).transpose(1, 2).flatten(2) * scale
                    a, y = a.flatten(0, 1), (y * scale).flatten(0, 1)
                    gram, cross, whole = gram + a.T @ a, cross + a.T @ y, whole + y.square().sum()
                gram.diagonal().add_(0.02 * gram.diagonal().mean())
                right = (cross * torch.linalg.solve(gram, cross)).sum()
                errors[i, kind, j] = float((whole - right) / idx.numel() / x.size(-1))
            progress(i * i + j)
        for n, y in enumerate(added):
            side.streams[n] = side.streams[n] + y
        side.add(side.think, i)
    progress.close()
    return errors
