"""The few tensor functions whose speed matters, and the one place that decides what `torch.compile` compiles.

Shapes: B sequences; T query positions; S key positions, of which the queries are the last T; n_head query
heads and n_kv_head key/value heads of d features, each KV head serving a group of query heads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# --- RoPE and fusion --------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split convention: features j and j + d/2 of x (B, heads, T, d) rotate together, by
    an angle that grows with the position. cos and sin are (T, d); both features of a pair have the same ones,
    except that the first has -sin."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin).type_as(x)


def fuse(sources: Sequence[Tensor], gates: Tensor | None) -> Tensor:
    """FusedKV (arXiv 2512.03870): the sum of gates[m] * sources[m], elementwise along the features.

    sources: m tensors (B, n_kv_head, S, d). gates: (m, n_kv_head, 1, d), or None for a single source."""
    if gates is None:
        return sources[0]
    return sum(gate * source for gate, source in zip(gates.type_as(sources[0]), sources))


# --- attention over a whole sequence ----------------------------------------------------------------------


def attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
    past_only: bool = False,
) -> Tensor:
    """Causal attention of q (B, n_head, T, d) over one or several fused sources of keys and of values, each
    (B, n_kv_head, S, d), with gates as in `fuse`. Returns (B, n_head, T, d). With many queries attention is
    bound by arithmetic, so the sources are fused first.

    With `past_only` a query does not see its own position (arXiv 2410.14442). That is ordinary causal
    attention without the last key. The very first position then sees nothing, and its output is zero."""
    (n_head, T), (n_kv_head, S) = q.shape[1:3], ks[0].shape[1:3]
    if past_only:
        ks, vs = [k[:, :, :-1] for k in ks], [v[:, :, :-1] for v in vs]
        if S > T:
            return attention(q, ks, vs, k_gates, v_gates)
        if T == 1:
            return torch.zeros_like(q)
        after_first = attention(q[:, :, 1:], ks, vs, k_gates, v_gates)
        return F.pad(after_first, (0, 0, 1, 0))  # zeros in front, along T
    k, v = fuse(ks, k_gates), fuse(vs, v_gates)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and S == T <= 512:
        return short_attention(q, k, v)
    if q.is_cuda and q.dtype == torch.float32 and n_head != n_kv_head:
        # Torch's fast kernels for float32 know no groups, and its slow one writes all scores to memory.
        k, v = (x.repeat_interleave(n_head // n_kv_head, dim=1) for x in (k, v))
        n_kv_head = n_head
    mask = None if S == T else causal_lower_right(T, S)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_head != n_kv_head
    )


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attention`, but with all scores at once. In bfloat16 training on a CPU this is twice as fast as
    torch's blockwise kernel, while the scores fit the CPU's caches."""
    (B, n_head, T, d), n_kv_head = q.shape, k.size(1)
    q = (q * d**-0.5).reshape(B * n_kv_head, -1, d)  # a group's queries below each other: (.., group * T, d)
    k, v = k.reshape(B * n_kv_head, T, d), v.reshape(B * n_kv_head, T, d)
    future = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future.repeat(n_head // n_kv_head, 1), q, k.mT)  # (B * n_kv_head, group * T, T)
    return (scores.softmax(-1) @ v).view(B, n_head, T, d)


# --- decoding: one position at a time, over the cache -----------------------------------------------------
# Decoding reads every weight and the whole cache once per token, and computes little with them: it is bound
# by memory. So these functions are written to be compiled into loops that read each byte once.

BLOCK = 128  # positions in a block of the cache, see model.KVCache


def decode_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    seen: Tensor,
    k_gates: Tensor | None = None,
    v_gates: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence, q (B, n_head, 1, d), over the first `seen` cached positions. The
    sources are n blocks of the cache: keys (n, B, n_kv_head, BLOCK, d), values (n, B, n_kv_head, d, BLOCK).
    `seen` is an int64 tensor, so that another value causes no recompilation. Returns (B, n_head, 1, d), zeros
    where nothing is seen.

    Fusion costs no extra memory traffic here, because the gates move to the query and to the output:
        q . (a0 K0 + a1 K1) = (q a0) . K0 + (q a1) . K1        P (b0 V0 + b1 V1) = b0 (P V0) + b1 (P V1)."""
    (B, n_head, _, d), (n, _, n_kv_head) = q.shape, ks[0].shape[:3]
    # This leaves q as it is, but makes the compiler write it to memory. Otherwise its rotation would be fused
    # into the loop over keys, and repeated for every one of them.
    q = torch.cat((q[..., : d // 2], q[..., d // 2 :]), dim=-1)
    q = q.reshape(B, n_kv_head, n_head // n_kv_head, d)
    folded = [q] if k_gates is None else [q * gate for gate in k_gates.type_as(q)]
    scores = sum(dot(x, k) for x, k in zip(folded, ks)).float()  # (n, B, n_kv_head, group, BLOCK)
    unseen = torch.arange(n * BLOCK, device=q.device).view(n, 1, 1, 1, BLOCK) >= seen
    scores = scores.masked_fill(unseen, torch.finfo(torch.float32).min) * d**-0.5
    # A softmax over each block, and then one over the blocks: no sum runs over all positions in a row.
    largest = scores.amax(-1, keepdim=True)  # (n, B, n_kv_head, group, 1)
    weights = (scores - largest).exp()
    share = (largest - largest.amax(0)).exp()
    total = (weights.sum(-1, keepdim=True) * share).sum(0)  # (B, n_kv_head, group, 1)
    sums = [(dot(weights, v).float() * share).sum(0) for v in vs]  # (B, n_kv_head, group, d) each
    out = sums[0] if v_gates is None else sum(gate * y for gate, y in zip(v_gates, sums))
    out = out / total * (seen > 0)  # divided last: once per feature, not once per position and feature
    return out.view(B, n_head, 1, d).type_as(q)


def write(
    k_store: Tensor | None, v_store: Tensor | None, k: Tensor | None, v: Tensor | None, positions: Tensor
) -> None:
    """Put the keys and values, where there are any, of T positions (T,), each (B, n_kv_head, T, d), into the
    blocks of a cache."""
    block, slot = positions // BLOCK, positions % BLOCK
    if k is not None:
        k_store[block, :, :, slot] = k.permute(2, 0, 1, 3)
    if v is not None:
        v_store[block, :, :, :, slot] = v.permute(2, 0, 1, 3)


def read_keys(k_store: Tensor, positions: Tensor) -> Tensor:
    """The keys (B, n_kv_head, T, d) that `write` has put at T positions (T,)."""
    return k_store[positions // BLOCK, :, :, positions % BLOCK].permute(1, 2, 0, 3)


def dot(x: Tensor, rows: Tensor) -> Tensor:
    """Every row of x (..., r, m) times every one of `rows` (..., n, m): (..., r, n). Made for few rows of
    x, where reading `rows` takes the time: compiled to products and sums it is one loop over `rows`, at the
    speed of memory, which a matrix product with one or a few rows does not reach."""
    if not torch.compiler.is_compiling():
        return x.type_as(rows) @ rows.mT
    return torch.stack([(rows * y.unsqueeze(-2)).sum(-1) for y in x.float().unbind(-2)], dim=-2)


# Without AVX-512 products of bfloat16 are emulated; converted to float32 they take a fifth of the time.
EMULATED_BF16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, with two exceptions where no gradients are needed: a compiled decode step of a few sequences
    uses `dot`, and a CPU that emulates bfloat16 computes in float32."""
    if not torch.is_grad_enabled():
        on_cpu = x.device.type == "cpu"
        few_rows = x.numel() // x.size(-1) <= (8 if on_cpu else 1)  # as measured; cuBLAS is fast from 2 on
        if few_rows and torch.compiler.is_compiling():
            y = dot(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
            return (y if bias is None else y + bias).type_as(x)
        if on_cpu and EMULATED_BF16 and x.dtype == torch.bfloat16 and not few_rows:
            bias = None if bias is None else bias.float()
            return F.linear(x.float(), weight.float(), bias).type_as(x)
    return F.linear(x, weight, bias)


def linears(x: Tensor, layers: Sequence[torch.nn.Linear]) -> Sequence[Tensor]:
    """The outputs of several linear layers for one input. In training they are one wide product, because a
    few large products are faster than many small ones."""
    if not torch.is_grad_enabled() or len(layers) == 1:
        return [layer(x) for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    y = F.linear(x, torch.cat([layer.weight for layer in layers]), bias)
    return y.split([layer.out_features for layer in layers], dim=-1)


# --- the loss ---------------------------------------------------------------------------------------------
# The logits of a whole batch, (B, T, vocab), would be its largest tensor by far. They are computed for some
# positions at a time, and in training their gradients right after them, so they never have to be kept.

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # how many exist at a time: enough to keep the device busy


def rows_at_once(weight: Tensor) -> int:
    """The number of positions whose logits are computed together."""
    return max(1, LOGITS.get(weight.device.type, LOGITS["cpu"]) // weight.size(0))


def loss_chunk(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses in nats, (N,), of hidden states x (N, C) before the output layer `weight` (vocab, C), and
    the gradient of their sum with respect to the logits, (N, vocab): probabilities, minus one at the
    target."""
    log_p = F.linear(x, weight).float().log_softmax(-1)
    losses = -log_p.gather(-1, targets[:, None])[:, 0]
    if torch.compiler.is_compiling():  # a single expression becomes a single loop
        is_target = torch.arange(log_p.size(1), device=x.device) == targets[:, None]
        return losses, (log_p.exp() - is_target.float()).type_as(x)
    gradient = log_p.exp_()
    gradient[torch.arange(len(x), device=x.device), targets] -= 1
    return losses, gradient.type_as(x)


class MeanCrossEntropy(torch.autograd.Function):
    """The mean loss, in chunks. `forward` already computes the gradients for x and weight, with the same
    products that a backward pass would need."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        total = 0.0
        with torch.autocast(kind, enabled=False):  # cast once, not in every chunk
            x, weight = x.to(dtype), weight.to(dtype)
            for start in range(0, len(x), rows_at_once(weight)):
                rows = slice(start, start + rows_at_once(weight))
                losses, gradient = chunk(x[rows], weight, targets[rows])
                x_grad[rows] = gradient @ weight
                if dtype == weight_grad.dtype:
                    weight_grad.addmm_(gradient.mT, x[rows])
                else:
                    weight_grad += gradient.mT @ x[rows]
                total = total + losses.sum()
        ctx.save_for_backward(x_grad, weight_grad)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        scale = grad / len(x_grad)
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


def mean_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk=loss_chunk) -> Tensor:
    """Mean loss in nats, differentiable once. x (B, T, C): hidden states before the output layer `weight`
    (vocab, C); targets (B, T): token ids."""
    return MeanCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), chunk)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of every position in nats, (B, T) float32, from the same arguments, for evaluation."""
    parts = zip(x.flatten(0, 1).split(rows_at_once(weight)), targets.flatten().split(rows_at_once(weight)))
    losses = [F.cross_entropy(F.linear(h, weight).float(), t, reduction="none") for h, t in parts]
    return torch.cat(losses).view_as(targets)


# --- compilation ------------------------------------------------------------------------------------------


def compile_training(model: torch.nn.Module) -> None:
    """Compile what stays the same while plans change: the two steps of a layer, one graph for all layers, and
    the loss. Plain Python routes between them, so a new plan causes no recompilation."""
    torch._dynamo.config.recompile_limit = 32  # own KV or not, fused or not, past only, with gradients
    for block in model.blocks:
        block.project, block.forward = torch.compile(block.project), torch.compile(block.forward)
    model.loss_chunk = torch.compile(model.loss_chunk)


def compile_decoding(model: torch.nn.Module) -> None:
    """Compile a layer's step for a single position, one graph for all layers and for all plans of one form.
    Its sizes are fixed but for the number of cache blocks. Prompts spend their time in matrix products and
    stay uncompiled, so that a new length causes no recompilation. On a GPU, `GPT.decode` records the step as
    a graph."""
    torch._dynamo.config.recompile_limit = 32
    # On a CPU, what multiplies every row of a weight must be normed and converted once, not once per row.
    options = {"realize_reads_threshold": 0} if model.embed.weight.device.type == "cpu" else None
    for block in model.blocks:
        block.decode = torch.compile(block.decode, dynamic=False, options=options)
    model.head = torch.compile(model.head, dynamic=False, options=options)
    model.compiled = True


class CudaGraph:
    """The decode step of a model over one cache, recorded once and then replayed, so that the GPU need not
    wait for Python. A recording never changes its sizes: it takes the position from a tensor of the cache
    and reads all of its blocks, of which `decode_attention` masks those not filled yet. It holds no
    reference to the cache, which holds the graph: in a circle, neither would be freed in time."""

    def __init__(self, step, idx: Tensor, cache):
        """`step` maps idx (B, 1) and the cache to logits (B, 1, vocab), and reads no Python state that
        moves."""
        self.idx = idx.clone()
        cache.fixed = True  # from here on, all blocks are read
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and warms up what must not happen while recording
                step(self.idx, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.idx, cache)
        cache.fixed = False

    def __call__(self, idx: Tensor) -> Tensor:
        """Logits of the cache's current position, which the next call overwrites."""
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits
