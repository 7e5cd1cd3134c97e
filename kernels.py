"""The tensor functions that sharing changes: RoPE, fusion, attention over own, shared, fused and strictly
past keys and values, the loss, and what `torch.compile` compiles.

Shapes: B sequences; T query positions; S key positions, of which the queries are the last T; nh query heads
and nkv key/value heads of d features, each KV head serving a group of nh / nkv query heads."""

from functools import partial

from support.devices import CudaGraph

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# --- RoPE and fusion --------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split convention: features j and j + d/2 of x (B, heads, T, d) rotate together, by an
    angle that grows with the position. cos and sin are (T, d), where the first half of sin has its sign
    changed."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin).type_as(x)


def fuse(sources: list[Tensor], gates: Tensor | None) -> Tensor:
    """FusedKV (arXiv 2512.03870): K_i = sum over m of gates[m] * K_m, elementwise along the features, and V_i
    likewise.

    sources: n tensors (B, nkv, S, d). gates: (n, nkv, 1, d), or None for a single source."""
    if gates is None:
        return sources[0]
    return sum(gate * source for gate, source in zip(gates.type_as(sources[0]), sources))


# --- attention over a whole sequence ----------------------------------------------------------------------


def attention(
    q: Tensor,
    ks: list[Tensor],
    vs: list[Tensor],
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
    past_only: bool = False,
) -> Tensor:
    """Causal attention of q (B, nh, T, d) over one or several fused sources of keys and of values, each
    (B, nkv, S, d), with gates as in `fuse`. Returns (B, nh, T, d).

    With `past_only` a query does not see its own position (arXiv 2410.14442), and position 0, which then sees
    nothing, gets zeros."""
    if past_only:  # sharing: ordinary causal attention without the last key
        ks, vs = [k[:, :, :-1] for k in ks], [v[:, :, :-1] for v in vs]
        if ks[0].size(2) < q.size(2):  # no position came before these, so the first query is position 0
            if q.size(2) == 1:
                return torch.zeros_like(q)
            after_first = attention(q[:, :, 1:], ks, vs, k_gates, v_gates)
            return F.pad(after_first, (0, 0, 1, 0))  # zeros in front, along T
    # sharing: with many queries attention is bound by arithmetic, so it is cheapest to fuse the sources
    # first.
    k, v = fuse(ks, k_gates), fuse(vs, v_gates)
    (nh, T), (nkv, S) = q.shape[1:3], k.shape[1:3]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and S == T <= 512:
        return short_attention(q, k, v)
    if q.is_cuda and q.dtype == torch.float32 and nh != nkv:
        # Torch's fast kernels for float32 know no groups, and its slow one writes all scores to memory.
        k, v = (x.repeat_interleave(nh // nkv, dim=1) for x in (k, v))
        nkv = nh
    mask = None if S == T else causal_lower_right(T, S)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=nh != nkv)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attention`, but with all scores at once. In bfloat16 training on a CPU this is twice as fast as
    torch's blockwise kernel, while the scores fit the CPU's caches."""
    (B, nh, T, d), nkv = q.shape, k.size(1)
    q = (q * d**-0.5).reshape(B * nkv, -1, d)  # the queries of a group below each other: (.., group * T, d)
    k, v = k.reshape(B * nkv, T, d), v.reshape(B * nkv, T, d)
    future = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future.repeat(nh // nkv, 1), q, k.mT)  # (B * nkv, group * T, T)
    return (scores.softmax(-1) @ v).view(B, nh, T, d)


# --- decoding: one position at a time, over the cache -----------------------------------------------------
# Decoding reads every weight and the whole cache once per token, and computes little with them: it is bound
# by memory. So these functions are written to be compiled into loops that read each byte once.

BLOCK = 128  # positions in a block of the cache, see model.KVCache


def decode_attention(
    q: Tensor,
    ks: list[Tensor],
    vs: list[Tensor],
    seen: Tensor,
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence, q (B, nh, 1, d), over the first `seen` positions of a cache. The
    sources are n blocks of it: keys (n, B, nkv, BLOCK, d), values (n, B, nkv, d, BLOCK). `seen` is an int64
    tensor, so that another value causes no recompilation. Returns (B, nh, 1, d), zeros where nothing is seen.

    Fusion costs no extra memory traffic here, because the gates move to the query and to the output:
        q . (a0 K0 + a1 K1) = (q a0) . K0 + (q a1) . K1        P (b0 V0 + b1 V1) = b0 (P V0) + b1 (P V1)."""
    (B, nh, _, d), (n, _, nkv) = q.shape, ks[0].shape[:3]
    # This leaves q as it is, but makes the compiler write it to memory. Otherwise its rotation would be fused
    # into the loop over keys, and repeated for every one of them.
    q = torch.cat((q[..., : d // 2], q[..., d // 2 :]), dim=-1)
    q = q.reshape(B, nkv, nh // nkv, d)
    # sharing: gates times query, not times keys. Each source is read as it lies in the cache.
    qs = [q] if k_gates is None else [q * gate for gate in k_gates.type_as(q)]
    scores = sum(rows_dot(x, k) for x, k in zip(qs, ks)).float()  # (n, B, nkv, group, BLOCK)
    unseen = torch.arange(n * BLOCK, device=q.device).view(n, 1, 1, 1, BLOCK) >= seen
    scores = scores.masked_fill(unseen, torch.finfo(torch.float32).min) * d**-0.5
    # A softmax over each block, and then one over the blocks: so blocks are computed in parallel.
    largest = scores.amax(-1, keepdim=True)  # (n, B, nkv, group, 1)
    weights = (scores - largest).exp()
    share = (largest - largest.amax(0)).exp()
    total = (weights.sum(-1, keepdim=True) * share).sum(0)  # (B, nkv, group, 1)
    sums = [(rows_dot(weights, v).float() * share).sum(0) for v in vs]  # (B, nkv, group, d) each
    out = sums[0] if v_gates is None else sum(gate * y for gate, y in zip(v_gates, sums))
    out = out / total * (seen > 0)  # divided last: once per feature, not once per position and feature
    return out.view(B, nh, 1, d).type_as(q)


def write(stores: tuple, new: tuple, positions: Tensor) -> None:
    """Write K and V of T new positions, each (B, nkv, T, d) or None, into the cache blocks `stores`, (k, v).
    positions: (T,)."""
    (k_store, v_store), (k, v) = stores, new
    block, slot = positions // BLOCK, positions % BLOCK
    # Indices that stand apart from each other put T first: (T, B, nkv, d).
    if k is not None:
        k_store[block, :, :, slot] = k.permute(2, 0, 1, 3)
    if v is not None:
        v_store[block, :, :, :, slot] = v.permute(2, 0, 1, 3)


def rows_dot(x: Tensor, rows: Tensor) -> Tensor:
    """Every row of x (..., r, m) times every one of `rows` (..., n, m): (..., r, n), for small r. Compiled,
    it is one loop over `rows` at the speed of memory, which a matrix product of a few rows does not reach."""
    if not torch.compiler.is_compiling():
        return x.type_as(rows) @ rows.mT
    return torch.stack([(rows * y.unsqueeze(-2)).sum(-1) for y in x.float().unbind(-2)], dim=-2)


class Linear(torch.nn.Linear):
    """torch.nn.Linear that uses `rows_dot` in compiled decoding of a few sequences."""

    def forward(self, x: Tensor) -> Tensor:
        most = 8 if x.device.type == "cpu" else 1  # rows: measured on a CPU, a guess for a GPU
        if torch.is_grad_enabled() or not torch.compiler.is_compiling() or x.shape[:-1].numel() > most:
            return super().forward(x)
        y = rows_dot(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias).type_as(x)


# --- the loss ---------------------------------------------------------------------------------------------
# The logits of a whole batch, (B, T, vocab), would be its largest tensor by far. So they are computed for
# some positions at a time and, where there are several such chunks, computed again for their gradient.

LOGITS = 1 << 26  # at a time on a CPU: 256 MB in float32, and copies of them; on a GPU four times as many


def chunk_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The losses in nats, (N,), of hidden states x (N, C) before the output layer `weight` (vocab, C)."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk=chunk_loss) -> Tensor:
    """The loss of every position in nats, (B, T) float32. x (B, T, C): hidden states before the output layer
    `weight` (vocab, C); targets (B, T): token ids; `chunk`: chunk_loss, or that compiled."""
    n = max(1, LOGITS * (4 if x.is_cuda else 1) // weight.size(0))
    parts = list(zip(x.flatten(0, 1).split(n), targets.flatten().split(n)))
    if len(parts) > 1 and torch.is_grad_enabled():
        chunk = partial(checkpoint, chunk, use_reentrant=False)
    return torch.cat([chunk(h, weight, t) for h, t in parts]).view_as(targets)


# --- compilation ------------------------------------------------------------------------------------------


def compile_training(model: torch.nn.Module) -> None:
    """Compile what stays the same while plans change: the two steps of a layer, one graph for all layers, and
    the loss. Plain Python routes between them, so a new plan causes no recompilation."""
    torch._dynamo.config.recompile_limit = 32  # own KV or not, fused or not, past only, with gradients
    for block in model.blocks:
        block.project, block.forward = torch.compile(block.project), torch.compile(block.forward)
    model.chunk_loss = torch.compile(model.chunk_loss)


def compile_decoding(model: torch.nn.Module) -> None:
    """Compile a layer's step for a single position, one graph for all layers and for all plans of one form.
    Its sizes are fixed but for the number of cache blocks. Prompts spend their time in matrix products and
    stay uncompiled, so that a new length causes no recompilation."""
    torch._dynamo.config.recompile_limit = 32
    # On a CPU, what multiplies every row of a weight must be normalized and converted once, not once per row.
    options = {"realize_reads_threshold": 0} if model.embed.weight.device.type == "cpu" else None
    for block in model.blocks:
        block.decode = torch.compile(block.decode, dynamic=False, options=options)
    model.head = torch.compile(model.head, dynamic=False, options=options)
    model.record = CudaGraph if model.embed.weight.is_cuda else None
