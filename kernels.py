"""The few tensor functions whose speed matters, and the one place that decides what is compiled.

Shapes: B sequences, T query positions, S key positions (S >= T, the queries are the last T of them),
n_head query and n_kv_head key/value heads of head_dim features, each KV head serving a group of query heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK = 128  # positions in a block of the cache


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
    (B, n_kv_head, S, d), with gates as in `fuse`. Returns (B, n_head, T, d). With many queries attention is
    bound by computing, so sources are fused first.

    `strict`: a query does not see its own position. Without the last key, ordinary causal attention is just
    that; the first position of all then sees nothing, and its output is zero."""
    (n_head, T), (n_kv_head, S) = q.shape[1:3], ks[0].shape[1:3]
    if strict:
        ks, vs = ([x[:, :, :-1] for x in xs] for xs in (ks, vs))
        if S > T:
            return attention(q, ks, vs, k_gates, v_gates)
        if T == 1:
            return torch.zeros_like(q)
        return F.pad(attention(q[:, :, 1:], ks, vs, k_gates, v_gates), (0, 0, 1, 0))
    k, v = fuse(ks, k_gates), fuse(vs, v_gates)
    mask = None if T == S else causal_lower_right(T, S)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_head != n_kv_head
    )


def decode_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    seen: Tensor,
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence, q (B, n_head, 1, d), over the first `seen` (an int64 tensor, so that
    its value compiles nothing) positions of cached sources in n blocks (see `model.KVCache`): keys
    (n, B, n_kv_head, BLOCK, d), values (n, B, n_kv_head, d, BLOCK). Returns (B, n_head, 1, d), zeros if seen
    is 0.

    Reading the cache is what takes the time, so the gates move to the query and the output, and every stored
    byte is read once, by all query heads of its group together:
        q . (a0 K0 + a1 K1) = (q a0) . K0 + (q a1) . K1      P (b0 V0 + b1 V1) = b0 (P V0) + b1 (P V1)."""
    (B, n_head, _, d), (n, _, n_kv_head) = q.shape, ks[0].shape[:3]
    q = q.reshape(B, n_kv_head, n_head // n_kv_head, d)
    folded = [q] if k_gates is None else [q * g for g in k_gates.type_as(q)]
    scores = sum(dot(x, k) for x, k in zip(folded, ks)).float()  # (n, B, n_kv_head, group, BLOCK)
    unseen = torch.arange(n * BLOCK, device=q.device).view(n, 1, 1, 1, BLOCK) >= seen
    scores = scores.masked_fill(unseen, torch.finfo(torch.float32).min)
    p = (d**-0.5 * (scores - scores.amax((0, -1), keepdim=True))).exp()
    # Divided by their sum last: compiled, every weight would else be divided once per feature.
    parts = [dot(p, v).float().sum(0) for v in vs]  # (B, n_kv_head, group, d)
    out = parts[0] if v_gates is None else sum(g * y for g, y in zip(v_gates, parts))
    out = out / p.sum(-1).sum(0).unsqueeze(-1) * (seen > 0)
    return out.view(B, n_head, 1, d).type_as(q)


def write(
    k_store: Tensor | None,
    v_store: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    block: Tensor,
    slot: Tensor,
) -> None:
    """Put keys and values of T positions, (B, n_kv_head, T, d) each, where there are any, at their places in
    the cache's blocks: number `block` and row `slot`, (T,) each."""
    if k is not None:
        k_store[block, :, :, slot] = k.permute(2, 0, 1, 3)
    if v is not None:
        v_store[block, :, :, :, slot] = v.permute(2, 0, 1, 3)


def first_blocks(store: Tensor, n: int | None) -> Tensor:
    """The first n of a cache's blocks, or all, of which a compiled function may see any number but one."""
    blocks = store[:n]
    torch._dynamo.mark_dynamic(blocks, 0)
    return blocks


def dot(x: Tensor, rows: Tensor) -> Tensor:
    """Every row of x (..., r, m) times every one of `rows` (..., n, m): (..., r, n). For few rows of x, where
    reading `rows` is what takes the time: compiled to products and sums this runs at the speed of memory (one
    loop over `rows` for all of x), which matrix products for one or a few rows do not."""
    if not torch.compiler.is_compiling():
        return x.type_as(rows) @ rows.mT
    return torch.stack([(rows * y.unsqueeze(-2)).sum(-1) for y in x.float().unbind(-2)], dim=-2)


# Products of bfloat16 are emulated without AVX-512; converted to float32 they take a fifth of the time.
SLOW_BF16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; as `dot` in a compiled decode step of few sequences, in float32 where bfloat16 is slow."""
    rows, cpu, grad = x.numel() // x.size(-1), x.device.type == "cpu", torch.is_grad_enabled()
    few = rows <= (8 if cpu else 1)  # up to where `dot` was the faster; on a GPU, cuBLAS soon is
    if few and torch.compiler.is_compiling() and not grad:
        y = dot(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).type_as(x)
    if SLOW_BF16 and cpu and x.dtype == torch.bfloat16 and not few and not grad:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).type_as(x)
    return F.linear(x, weight, bias)


LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # rows of so many in all are computed at once


def rows_at_once(weight: Tensor) -> int:
    """Positions whose logits exist at the same time: enough to keep the device busy, never all of a batch."""
    return max(1, LOGITS.get(weight.device.type, LOGITS["cpu"]) // weight.size(0))


def loss_chunk(x: Tensor, weight: Tensor, targets: Tensor, scale: float | None):
    """Losses in nats, (N,), of x (N, C) before the output layer `weight` (vocab, C), and, given `scale`, the
    gradients of scale times their sum: for x, (N, C), and for weight, (vocab, C)."""
    logits = F.linear(x, weight).float()
    log_z = logits.logsumexp(-1, keepdim=True)
    losses = (log_z - logits.gather(-1, targets[:, None]))[:, 0]
    if scale is None:
        return losses, None, None
    d = logits.sub_(log_z).exp_()  # probabilities; minus one at the target, the gradient for the logits
    d = d.scatter_add_(-1, targets[:, None], d.new_full((len(d), 1), -1.0)).mul_(scale).type_as(x)
    return losses, d @ weight, d.mT @ x


class MeanCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy by chunks. Gradients are computed with each chunk, where its logits are at hand: the
    same products that backward would need, and none twice."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk):
        dx, dw, total = torch.empty_like(x), torch.zeros_like(weight), 0.0
        rows = rows_at_once(weight)
        for part in range(0, len(x), rows):
            here = slice(part, part + rows)
            losses, dx[here], d = chunk(x[here], weight, targets[here], 1 / len(x))
            dw += d
            total = total + losses.sum()
        ctx.save_for_backward(dx, dw)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None


def mean_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk=loss_chunk) -> Tensor:
    """Mean loss in nats, differentiable: x (B, T, C) hidden states, weight (vocab, C) of the output layer,
    targets (B, T) token ids. Never holds the (B, T, vocab) logits."""
    return MeanCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), chunk)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk=loss_chunk) -> Tensor:
    """Loss of every position in nats, (B, T) float32, from the same arguments."""
    rows = rows_at_once(weight)
    parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows))
    return torch.cat([chunk(a, weight, b, None)[0] for a, b in parts]).view_as(targets)


def compile_model(model: torch.nn.Module) -> None:
    """Compile for training what stays the same while plans change: a layer's two steps, one graph for all
    layers, and the loss. Plain Python routes between them, so a new plan compiles nothing."""
    torch._dynamo.config.recompile_limit = 32  # variants: own KV or not, fused or not, strict, with gradients
    for block in model.blocks:
        block.kv, block.forward = torch.compile(block.kv), torch.compile(block.forward)
    model.loss_chunk = torch.compile(model.loss_chunk)


def compile_decode(model: torch.nn.Module) -> None:
    """Compile a layer for a single position, one graph for all layers and plans of a form, with sizes fixed
    but for the number of cache blocks. Prompts spend their time in matrix products and stay as they are, so
    their lengths compile nothing. On a GPU `GPT.stream` then replays each cache's steps as one CUDA graph."""
    torch._dynamo.config.recompile_limit = 32
    # On a CPU, what is multiplied with every row of a weight is normed and converted once, not for each row.
    once = {"realize_reads_threshold": 0} if model.embed.weight.device.type == "cpu" else None
    for block in model.blocks:
        block.step = torch.compile(block.step, dynamic=False, options=once)
    model.head = torch.compile(model.head, dynamic=False, options=once)
    model.compiled = True


class CudaGraph:
    """One decode step of `model` with `cache`, recorded and then replayed: the GPU does not wait for Python.
    Its sizes never change: it reads the position from a tensor and always all blocks of the cache, of which
    `decode_attention` masks the rest. Called with the same cache, which it does not hold, or neither would
    ever be freed: idx (B, 1) -> logits (B, 1, vocab), which the next call overwrites."""

    def __init__(self, model: torch.nn.Module, cache, idx: Tensor):
        self.idx, length = idx.clone(), cache.length
        self.position = cache.position = torch.full((1,), length, device=idx.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and warms up what must not happen while recording
                model(self.idx, cache=cache)
                cache.length = length
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model(self.idx, cache=cache)[0]
        cache.length, cache.position = length, None  # steps outside of the graph count for themselves

    def __call__(self, cache, idx: Tensor) -> Tensor:
        self.idx.copy_(idx)
        self.position.fill_(cache.length)
        self.graph.replay()
        cache.length += 1
        return self.logits
