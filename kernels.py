"""The few tensor functions whose speed matters, and the one place that decides what is compiled.

Shapes: B sequences, T query positions, S key positions (S >= T, the queries are the last T of them),
n_head query and n_kv_head key/value heads of head_dim features, each KV head serving a group of query heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split convention: features j and j + d/2 of x (B, heads, T, d) turn together by the
    position's angle; cos and sin are (T, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def fuse(sources: Sequence[Tensor], gates: Tensor | None) -> Tensor:
    """FusedKV, arXiv 2512.03870: sum over sources m of gates[m] * sources[m], elementwise along the features.

    sources: each (B, n_kv_head, S, d). gates: (m, n_kv_head, 1, d), or None for a single source."""
    if gates is None:
        return sources[0]
    return sum(g * x for g, x in zip(gates.type_as(sources[0]), sources))


def attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """Causal attention of q (B, n_head, T, d) over one or several fused sources of keys and of values, each
    (B, n_kv_head, S, d), with gates as in `fuse`. Returns (B, n_head, T, d).

    Many queries: fuse, then attend, since attention is compute-bound. One query: reading the cache is what
    takes the time, so the gates move to the query and the output and every stored byte is read once,
        q . (a0 K0 + a1 K1) = (q a0) . K0 + (q a1) . K1      P (b0 V0 + b1 V1) = b0 (P V0) + b1 (P V1).

    `strict`: a query does not see its own position. Without the last key, ordinary causal attention is just
    that; the first position of all then sees nothing, and its output is zero."""
    (B, n_head, T, d), (n_kv_head, S) = q.shape, ks[0].shape[1:3]
    if strict:
        ks, vs = ([x[:, :, :-1] for x in xs] for xs in (ks, vs))
        if S > T:
            return attention(q, ks, vs, k_gates, v_gates)
        if T == 1:
            return torch.zeros_like(q)
        return F.pad(attention(q[:, :, 1:], ks, vs, k_gates, v_gates), (0, 0, 1, 0))
    if T > 1 or S == 1:
        k, v = fuse(ks, k_gates), fuse(vs, v_gates)
        mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_head != n_kv_head
        )
    q = q.view(B, n_kv_head, n_head // n_kv_head, d) * d**-0.5
    folded = [q] if k_gates is None else [q * g for g in k_gates.type_as(q)]
    scores = sum(x @ k.transpose(-1, -2) for x, k in zip(folded, ks))  # (B, n_kv_head, group, S)
    p = scores.float().softmax(dim=-1).type_as(q)
    parts = [p @ v for v in vs]
    out = parts[0] if v_gates is None else sum(g * y for g, y in zip(v_gates.type_as(q), parts))
    return out.view(B, n_head, 1, d)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of every position, in nats: x (B, T, C) hidden states, weight (vocab, C) of the output layer,
    targets (B, T) token ids. Returns (B, T) float32."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def compile_model(model: torch.nn.Module) -> None:
    """Compile the pieces of a GPT that stay the same while plans change: a layer's two steps, one graph
    for all layers, and the loss. Plain Python routes between them, so a new plan compiles nothing."""
    torch._dynamo.config.recompile_limit = 32  # variants: own KV or not, fused or not, strict, with gradients
    for block in model.blocks:
        block.kv, block.forward = torch.compile(block.kv), torch.compile(block.forward)
    model.head_losses = torch.compile(model.head_losses)
