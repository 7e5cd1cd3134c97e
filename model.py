"""The transformer and its KV cache: Llama-shaped (RMSNorm, RoPE, SwiGLU, grouped-query attention), with one
attention forward for training, prefill and decode under every plan of `kv_router.py`.

Shapes: B sequences, T positions, C = n_embd features, nh query and nkv key/value heads of d features each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from costs import Shape
from kv_router import Plan, PlanError

MAX_CONTEXT = 1 << 20  # tokens; a damaged file must not make us allocate without bound
PREFILL_CHUNK = 1024  # prompt positions that run through the layers at once, which bounds memory

Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles at T positions, (T, d) each


@dataclass(kw_only=True)
class GPTConfig(Shape):
    """Sizes (see `costs.Shape`) and the plan that the parameters are built for."""

    block_size: int = 256
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, see rope_frequencies
    norm_eps: float = 1e-5
    plan: str = "full"
    router_lowest: int = 0  # no layer was trained to take over the route of one below this
    key_residual: bool = False  # the keys of layer router_lowest are added to those of all layers above it
    stop_tokens: list = field(default_factory=list)  # ids that end a text, besides the tokenizer's own

    def __post_init__(self):
        super().__post_init__()
        if not all(type(token) is int for token in self.stop_tokens):
            raise PlanError(f"stop_tokens {self.stop_tokens!r} is not a list of token ids")
        if not 1 <= self.block_size <= MAX_CONTEXT:
            raise PlanError(f"block_size {self.block_size} is not valid; it must be 1 to {MAX_CONTEXT}")


# --- layers -----------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """One layer's part of attention: its own keys and values, where some layer reads them, and its queries,
    which read whatever its route names."""

    def __init__(self, config: GPTConfig, plan: Plan, layer: int):
        super().__init__()
        C, nh, nkv, d = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_kv_head, self.head_dim = nkv, d
        has_k, has_v = layer in plan.k_layers, layer in plan.v_layers
        self.q_proj = Linear(C, nh * d, bias=config.qkv_bias)
        self.k_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_k else None
        self.v_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_v else None
        self.o_proj = Linear(nh * d, C, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm and has_k else None
        # Fusion gates (arXiv 2512.03870). Keys are fused after RoPE; one gate for both features of a
        # rotated pair keeps attention a function of relative position. Where gates start matters: at the
        # layer's own K and V if they are among the sources, otherwise like FusedKV-Lite at the top K and
        # the bottom V.
        k, v = plan[layer].k, plan[layer].v
        self.k_gate = self.new_gate(k, start=layer if layer in k else k[-1], width=d // 2)
        self.v_gate = self.new_gate(v, start=layer if layer in v else v[0], width=d)

    def new_gate(self, sources: tuple[int, ...], start: int, width: int) -> nn.Parameter | None:
        """Gates (m, nkv, 1, width) over m sources: one for the source `start`, zero for the others."""
        if len(sources) == 1:
            return None
        one_hot = torch.tensor([float(j == start) for j in sources])
        return nn.Parameter(one_hot.view(-1, 1, 1, 1).repeat(1, self.n_kv_head, 1, width))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, heads * d) -> (B, heads, T, d)

    def norm_and_rotate(self, x: Tensor, norm: nn.RMSNorm | None, rope: Rope) -> Tensor:
        if norm is not None:  # with the weight in the type of x: bfloat16 keys must stay bfloat16
            x = F.rms_norm(x, norm.normalized_shape, norm.weight.type_as(x), norm.eps)
        return kernels.rotate(x, *rope)

    def project(
        self, h: Tensor, rope: Rope, need_q: bool, need_k: bool, need_v: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Queries (B, nh, T, d), keys and values (B, nkv, T, d), as far as they are needed."""
        needed = ((self.q_proj, need_q), (self.k_proj, need_k), (self.v_proj, need_v))
        outputs = [self.heads(y) for y in kernels.linears(h, [proj for proj, need in needed if need])]
        v = outputs.pop() if need_v else None
        k = self.norm_and_rotate(outputs.pop(), self.k_norm, rope) if need_k else None
        q = self.norm_and_rotate(outputs.pop(), self.q_norm, rope) if need_q else None
        return q, k, v

    def forward(
        self, q: Tensor, ks: list[Tensor], vs: list[Tensor], past_only: bool, seen: Tensor | None
    ) -> Tensor:
        k_gate = torch.cat((self.k_gate, self.k_gate), dim=-1) if len(ks) > 1 else None  # (m, nkv, 1, d)
        v_gate = self.v_gate if len(vs) > 1 else None
        if seen is None:
            y = kernels.attention(q, ks, vs, k_gate, v_gate, past_only)  # (B, nh, T, d)
        else:
            y = kernels.decode_attention(q, ks, vs, seen, k_gate, v_gate)  # (B, nh, 1, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = kernels.linears(x, [self.gate_proj, self.up_proj])
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """A layer, in two steps: its queries, keys and values, and attention with the MLP. Between the two, plain
    Python decides whose K and V the second step reads, so each step can be compiled once for every plan."""

    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = attention
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def project(self, x: Tensor, rope: Rope, need_q: bool, need_k: bool, need_v: bool):
        """The layer's queries and its own keys and values, as far as they are needed, from x (B, T, C)."""
        return self.attn.project(self.norm1(x), rope, need_q, need_k, need_v)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        ks: list[Tensor],
        vs: list[Tensor],
        past_only: bool,
        seen: Tensor | None = None,
    ) -> Tensor:
        """The layer's output (B, T, C), from its input x and its queries. ks and vs are the sources of its
        route: of a whole sequence as in `kernels.attention` or, where `seen` says how many positions are
        filled, blocks of a cache as in `kernels.decode_attention`."""
        x = x + self.attn(q, ks, vs, past_only, seen)
        return x + self.mlp(self.norm2(x))

    def decode(
        self,
        x: Tensor,
        rope: Rope,
        position: Tensor,
        own: tuple[Tensor | None, Tensor | None],
        ks: list[Tensor],
        vs: list[Tensor],
        past_only: bool,
        base: Tensor | None = None,
    ) -> Tensor:
        """Both steps for a single position, x (B, 1, C), over the blocks of a cache. The layer's own K and
        V are written to its blocks `own` first, where there are any: some layer reads them. The keys in the
        blocks `base` are added to its own, see GPT.key_base."""
        q, k, v = self.project(x, rope, True, own[0] is not None, own[1] is not None)
        if base is not None:
            k = k + kernels.read_keys(base, position)
        kernels.write(*own, k, v, position)
        seen = position if past_only else position + 1
        return self(x, q, ks, vs, past_only, seen)


# --- keys and values by layer -----------------------------------------------------------------------------
# What the layers of one forward share: the plan, the angles of RoPE, and each other's K and V. There are
# two such stores, with the same methods `put`, `new_keys` and `sources`: one for a whole sequence, as in
# training, and the KV cache.


class SequenceKV:
    """The keys and values of all positions of a sequence, while its layers run: (B, nkv, T, d) each."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rope: Rope | None = None
        self.k: dict[int, Tensor | None] = {}
        self.v: dict[int, Tensor | None] = {}
        self.passes, self.change = 1, 0.0  # see KVCache

    def put(self, layer: int, k: Tensor | None, v: Tensor | None) -> None:
        self.k[layer], self.v[layer] = k, v

    def new_keys(self, layer: int) -> Tensor:
        return self.k[layer]

    def sources(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and the values that a layer reads."""
        route = self.plan[layer]
        return [self.k[j] for j in route.k], [self.v[j] for j in route.v]


class KVCache:
    """The keys and values of up to `max_len` positions, of exactly those layers that `plan` stores. `length`
    positions are filled; set it to 0 to use the cache anew. `bytes` is what is allocated.

    Positions lie in whole blocks of kernels.BLOCK: k[i] is (n, B, nkv, BLOCK, d) and v[i] (n, B, nkv, d,
    BLOCK). Decoding sums key times query over features, and weight times value over positions; this way both
    sums run along memory, and filled blocks are a view with the same strides in a cache of any size."""

    def __init__(
        self, config: GPTConfig, plan: Plan, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"
    ):
        self.n_blocks = max(2, -(-max_len // kernels.BLOCK))  # two, because torch.compile specializes on one
        shape = (self.n_blocks, batch_size, config.n_kv_head, kernels.BLOCK, config.head_dim)
        v_shape = (*shape[:3], config.head_dim, kernels.BLOCK)
        self.k = {i: torch.zeros(shape, dtype=dtype, device=device) for i in plan.k_layers}
        self.v = {i: torch.zeros(v_shape, dtype=dtype, device=device) for i in plan.v_layers}
        self.plan, self.max_len, self.length = plan, max_len, 0
        self.rope: Rope | None = None
        # How the iterated layers of a cyclic plan fared over the last prompt: how often they ran, and by how
        # much, relative to the largest value, the last pass still changed their output; 0 where it is exact.
        self.passes, self.change = 1, 0.0
        # For decoding: the last position as a tensor, and the recorded step, see kernels.CudaGraph.
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.fixed, self.graph = False, None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.k.values(), *self.v.values()))

    def extend(self, T: int) -> Tensor:
        """Make room for T more positions, whose K and V are `put` next. Returns their numbers, (T,)."""
        self.length += T
        self.position.fill_(self.length - 1)
        self.new_positions = torch.arange(self.length - T, self.length, device=self.position.device)
        return self.new_positions

    def put(self, layer: int, k: Tensor | None, v: Tensor | None) -> None:
        """Write a layer's keys and values, (B, nkv, T, d) each, at the new positions."""
        kernels.write(self.k.get(layer), self.v.get(layer), k, v, self.new_positions)

    def new_keys(self, layer: int) -> Tensor:
        """A layer's keys at the new positions, (B, nkv, T, d)."""
        return kernels.read_keys(self.k[layer], self.new_positions)

    def sources(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the keys and values that a layer reads, (B, nkv, length, d) each."""
        ks, vs = self.filled_blocks()
        ks = [ks[j].permute(1, 2, 0, 3, 4).flatten(2, 3) for j in self.plan[layer].k]
        vs = [vs[j].permute(1, 2, 0, 4, 3).flatten(2, 3) for j in self.plan[layer].v]
        return [k[:, :, : self.length] for k in ks], [v[:, :, : self.length] for v in vs]

    def filled_blocks(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Views of the blocks that hold the filled positions, or with `fixed` of all blocks."""
        n = self.n_blocks if self.fixed else max(2, -(-self.length // kernels.BLOCK))
        ks, vs = ({i: t[:n] for i, t in stores.items()} for stores in (self.k, self.v))
        for view in (*ks.values(), *vs.values()):
            torch._dynamo.mark_dynamic(view, 0)  # another number of blocks causes no recompilation
        return ks, vs


# --- the model --------------------------------------------------------------------------------------------


class GPT(nn.Module):
    attention = Attention  # a study that changes attention derives a class from this one and sets its own

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.plan = Plan.parse(config.plan, config.n_layer)
        self.check_sources(self.plan)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, self.attention(config, self.plan, i)) for i in range(config.n_layer)
        )
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        for block in self.blocks:  # the residual stream is a sum of 2 n_layer outputs
            for proj in (block.attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(proj.weight, std=0.02 * (2 * config.n_layer) ** -0.5)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.rope_table: Rope | None = None
        self.compiled, self.loss_chunk = False, kernels.loss_chunk  # what kernels.compile_... replace

    @staticmethod
    def init_weights(module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def rope(self, positions: Tensor) -> Rope:
        """Cosines and sines of the angles at the positions (T,), as `kernels.rotate` wants them: (T, d)
        each. The table is made at first use and is no buffer, so that casting the model leaves it in
        float32: in bfloat16 the angles of far positions would be off by whole turns."""
        if self.rope_table is None or self.rope_table[0].device != positions.device:
            everywhere = torch.arange(self.config.block_size, device=positions.device)
            angles = torch.outer(everywhere, rope_frequencies(self.config).to(positions.device))
            cos, sin = angles.cos(), angles.sin()
            self.rope_table = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        cos, sin = self.rope_table
        return cos[positions], sin[positions]

    # --- plans ---

    def resolve(self, plan: Plan | str | None) -> Plan:
        """The plan to run under, by default the one that the parameters were built for. Raises PlanError
        where the model lacks what the plan needs."""
        if plan is None:
            return self.plan
        if isinstance(plan, str):
            plan = Plan.parse(plan, self.config.n_layer)
        if len(plan) != self.config.n_layer:
            raise PlanError(
                f"plan {plan.spec!r} is for {len(plan)} layers and the model has {self.config.n_layer}"
            )
        self.check_sources(plan)
        for i, (built, asked) in enumerate(zip(self.plan.routes, plan.routes)):
            for kind, gates, sources in (("K", built.k, asked.k), ("V", built.v, asked.v)):
                if len(sources) > 1 and sources != gates:
                    raise PlanError(
                        f"plan {plan.spec!r}: layer {i} fuses the {kind} of layers {listed(sources)}, and "
                        f"this model, built for {self.plan.spec!r}, has no gates for that; "
                        "train one with --plan"
                    )
        return plan

    def check_sources(self, plan: Plan) -> None:
        """Raise PlanError where the plan reads keys or values that the model does not compute, or where it
        does not store the keys that are added to others."""
        for i, route in enumerate(plan.routes):
            for kind, have, want in (("K", self.plan.k_layers, route.k), ("V", self.plan.v_layers, route.v)):
                if missing := set(want) - set(have):
                    raise PlanError(
                        f"plan {plan.spec!r}: layer {i} reads {kind} of layer {min(missing)}, which this "
                        f"model, built for {self.plan.spec!r}, does not compute; it has {kind} of layers "
                        f"{listed(have)}"
                    )
        base = self.key_base(plan.k_layers[-1])
        if base is not None and base not in plan.k_layers:
            raise PlanError(
                f"plan {plan.spec!r} stores K of layer {plan.k_layers[-1]} and not of layer {base}, which "
                f"this model adds to it (--key_residual); keep K of layer {base}, too"
            )

    def key_base(self, i: int) -> int | None:
        """The layer whose keys are added to those of layer i: with key_residual, layer `router_lowest` for
        all layers above it. A layer that is routed to another's keys then still finds those in them."""
        lowest = self.config.router_lowest
        return lowest if self.config.key_residual and i > lowest else None

    # --- many positions at once: training, evaluation, prompts ---

    def project(self, i: int, x: Tensor, kv: SequenceKV | KVCache, need_q: bool = True) -> Tensor | None:
        """Layer i's own K and V, from its input x (B, T, C), go into `kv`. Returns its queries."""
        q, k, v = self.blocks[i].project(x, kv.rope, need_q, i in kv.plan.k_layers, i in kv.plan.v_layers)
        base = self.key_base(i)
        if k is not None and base is not None:
            k = k + kv.new_keys(base)
        kv.put(i, k, v)
        return q

    def layer(self, i: int, x: Tensor, kv: SequenceKV | KVCache) -> Tensor:
        """Layer i's output (B, T, C). It reads from `kv` what its route names."""
        q = self.project(i, x, kv)
        return self.blocks[i](x, q, *kv.sources(i), kv.plan.reads_above(i))

    def run_layers(
        self, x: Tensor, kv: SequenceKV | KVCache, passes: int | None = None, until: int | None = None
    ) -> Tensor:
        """From the residual stream below the first layer, (B, T, C), to that above the last. With
        `until`, a layer that ends a segment, it stops at that layer's input, with its own K and V in `kv`."""
        for low, high in kv.plan.segments:
            if low < high:
                x = self.iterate(low, high, x, kv, passes)
            if high == until:
                self.project(high, x, kv, need_q=False)
                return x
            x = self.layer(high, x, kv)
        return x

    def iterate(
        self, low: int, high: int, x: Tensor, kv: SequenceKV | KVCache, passes: int | None = None
    ) -> Tensor:
        """A segment whose layers low .. high read each other in a circle (arXiv 2410.14442). Every pass
        runs them from the same input x, (B, T, C), over the KV that the pass before has left; the first
        one finds zeros. Returns the input of layer `high` in the last pass, which `run_layers` runs.

        There are at most `passes` passes, all with gradients; by default forward_passes without gradients
        and backward_passes with. After n passes the first n positions are exact, so T passes always
        suffice. Without gradients, iteration also stops when nothing changes any more."""
        B, T, _ = x.shape
        with_gradients = torch.is_grad_enabled()
        n_with_gradients = passes or self.config.backward_passes
        limit = min(T, passes or self.config.forward_passes + self.config.backward_passes)
        zeros = x.new_zeros(B, self.config.n_kv_head, T, self.config.head_dim)
        for i in range(low, high + 1):
            kv.put(i, zeros if i in kv.plan.k_layers else None, zeros if i in kv.plan.v_layers else None)
        before, change = None, float("inf")
        for n in range(1, limit + 1):
            with torch.set_grad_enabled(with_gradients and n > limit - n_with_gradients):
                y = x
                for i in range(low, high):
                    y = self.layer(i, y, kv)
                if n < limit:  # of layer `high`, the next pass needs only what the others read
                    self.project(high, y, kv, need_q=False)
            if not with_gradients and n > 1:
                change = float((y - before).abs().max() / before.abs().max())
            exact = n == T or change <= 4 * torch.finfo(y.dtype).eps  # what is left is rounding
            if exact:
                break
            before = y
        kv.passes, kv.change = max(kv.passes, n), max(0.0 if exact else change, kv.change)
        return y

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        plan: Plan | str | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx (B, T) token ids -> (logits, loss).

        Without targets: the last position's logits, (B, 1, vocab), and None. With targets (B, T): None and
        the mean loss in nats per token. A `cache` is read, extended by the T positions, and sets the plan;
        ValueError if another plan is asked for, or targets."""
        if cache is not None:
            if targets is not None or self.resolve(plan or cache.plan) != cache.plan:
                raise ValueError(f"this cache is for generation under plan {cache.plan.spec!r}; make another")
            self.check_fits(cache.length + idx.size(1), min(cache.max_len, self.config.block_size))
            return (self.decode if idx.size(1) == 1 else self.prefill)(idx, cache), None
        x = self.hidden(idx, SequenceKV(self.resolve(plan)))
        if targets is None:
            return self.head(x[:, -1:]), None
        return None, kernels.mean_cross_entropy(self.norm(x), self.lm_head.weight, targets, self.loss_chunk)

    def check_fits(self, n_positions: int, room: int) -> None:
        if n_positions > room:
            raise ValueError(
                f"{n_positions} positions do not fit the context of {room}; "
                "shorten the prompt or ask for less"
            )

    def hidden(self, idx: Tensor, kv: SequenceKV, passes: int | None = None) -> Tensor:
        """The residual stream above the last layer, (B, T, C), of a whole sequence, idx (B, T), under the
        plan of `kv`, which is left with the keys and values of the stored layers."""
        self.check_fits(idx.size(1), self.config.block_size)
        kv.rope = self.rope(torch.arange(idx.size(1), device=idx.device))
        return self.run_layers(self.embed(idx), kv, passes)

    def head(self, x: Tensor) -> Tensor:
        """Logits of one position, (B, 1, vocab), from the residual stream above the last layer."""
        return self.lm_head(self.norm(x))

    def losses(self, idx: Tensor, targets: Tensor, plan: Plan | str | None = None) -> Tensor:
        """The loss of every position, (B, T), in nats, for evaluation."""
        x = self.norm(self.hidden(idx, SequenceKV(self.resolve(plan))))
        return kernels.cross_entropy(x, self.lm_head.weight, targets)

    def logits(self, idx: Tensor, plan: Plan | str | None = None, passes: int | None = None) -> Tensor:
        """Logits of every position, (B, T, vocab), for tests and study. A cyclic plan iterates `passes`
        times, by default until it is exact; passes below 1 raise ValueError."""
        if passes is not None and passes < 1:
            raise ValueError(f"passes {passes} is not valid; it must be 1 or more")
        x = self.hidden(idx, SequenceKV(self.resolve(plan)), passes or idx.size(1))
        return self.lm_head(self.norm(x))

    # --- generation ---

    def prefill(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Fill the cache with T prompt positions, idx (B, T). Returns the last one's logits, (B, 1, vocab).

        Above the highest stored layer nothing needs the other positions, so they stop there: with FusedKV, at
        half the layers (arXiv 2512.03870)."""
        top = cache.plan.last_full_layer
        cache.passes, cache.change = 1, 0.0
        for part in idx.split(PREFILL_CHUNK, dim=1):
            cache.rope = self.rope(cache.extend(part.size(1)))
            x = self.run_layers(self.embed(part), cache, until=top)
        # A copy, because the strides of a view depend on T: every length of prompt would recompile the step.
        last = x.narrow_copy(1, x.size(1) - 1, 1)
        return self.head(self.last_position(last, cache, first=top))

    def decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        """One more position, idx (B, 1) -> logits (B, 1, vocab). Exact for cyclic plans too: what a layer
        reads of layers above are earlier positions, which are in the cache."""
        cache.length += 1
        cache.position.fill_(cache.length - 1)
        if self.compiled and idx.is_cuda and cache.graph is None:
            cache.graph = kernels.CudaGraph(self.decode_step, idx, cache)
        return self.decode_step(idx, cache) if cache.graph is None else cache.graph(idx)

    def decode_step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """The part of `decode` that runs on the device."""
        return self.head(self.last_position(self.embed(idx), cache, first=0))

    def last_position(self, x: Tensor, cache: KVCache, first: int) -> Tensor:
        """Layers `first` and above for a single position, x (B, 1, C), the one of number cache.position."""
        plan, rope = cache.plan, self.rope(cache.position)
        ks, vs = cache.filled_blocks()
        for i in range(first, self.config.n_layer):
            own = ks.get(i), vs.get(i)
            sources = [ks[j] for j in plan[i].k], [vs[j] for j in plan[i].v]
            base = ks.get(self.key_base(i)) if i in plan.k_layers else None
            x = self.blocks[i].decode(x, rope, cache.position, own, *sources, plan.reads_above(i), base)
        return x

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        plan: Plan | str | None = None,
        seed: int | None = None,
        cache: KVCache | None = None,
        exact_prefill: bool = False,
        n_vocab: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue idx (B, T): prefill once, then one position a step. Yields each new column, (B, 1).

        Temperature 0 is greedy. A `cache` given is continued from where it is. `exact_prefill` feeds the
        prompt token by token, which for cyclic plans is exact whatever the number of passes. Only the first
        `n_vocab` tokens are drawn, where a model has more of them than its tokenizer. Raises ValueError at
        once, before the first token, where the tokens asked for do not fit the context or the cache."""
        B, T = idx.shape
        before = cache.length if cache else 0
        total = before + T + max_new_tokens
        if T < 1 or total > self.config.block_size:
            filled = f" after the {before} in the cache" if before else ""
            raise ValueError(
                f"a prompt of {T} tokens and {max_new_tokens} new ones{filled} do not fit the context of "
                f"{self.config.block_size} tokens (1 prompt token at least)"
            )
        if cache is None:
            plan = self.resolve(plan)
            cache = KVCache(self.config, plan, B, total, self.embed.weight.dtype, idx.device)
        if total - 1 > cache.max_len:  # the last new token is not fed back
            raise ValueError(
                f"{T} tokens and {max_new_tokens} new ones do not fit a cache of {cache.max_len} positions, "
                f"{before} of them taken; make a longer one"
            )
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        pieces = idx.split(1, dim=1) if exact_prefill else [idx]

        @torch.no_grad()
        def tokens() -> Iterator[Tensor]:
            inputs = list(pieces)
            for _ in range(max_new_tokens):
                for piece in inputs:
                    logits = self(piece, plan=plan, cache=cache)[0]
                column = sample(logits[:, -1, :n_vocab].float(), temperature, top_k, generator)
                inputs = [column]
                yield column

        return tokens()

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """`stream` in one piece: (B, T) -> (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **options)], dim=1)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token for each row of logits (B, vocab): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # The largest of probability / exponential noise is a draw by probability, as in torch.multinomial, but
    # without its checks, for which a GPU would have to wait.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1, keepdim=True)


def rope_frequencies(config: GPTConfig) -> Tensor:
    """How far each pair of features rotates from one position to the next, in radians: (d/2,)."""
    d = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2) / d)
    if scaling := config.rope_scaling:
        # Llama 3 stretches to longer contexts: pairs that rotate slowly, less than low_freq_factor times in
        # the original context, do so `factor` times slower; fast ones stay; those between are interpolated.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
