"""The transformer and its KV cache: Llama-shaped (RMSNorm, RoPE, SwiGLU, grouped-query attention), with one
path through the layers for training, prompts and decoding, under every plan of `kv_router.py`.

Names, and what the papers call them:

    B, T, C      sequences, positions, features of the residual stream (n_embd)
    nh, nkv, d   query heads, key/value heads, features of a head
    q, k, v      one layer's queries (B, nh, T, d), keys after RoPE and values (B, nkv, T, d): Q_i, K_i, V_i
    plan, route  whose K and V every layer reads; the entry of one layer. A source is a layer that is read
    gates        a and b of FusedKV, one per source, KV head and feature: K_i = a_0 K_0 + a_j K_j and
                 V_i = b_0 V_0 + b_j V_j, where j is the middle layer
    past_only    a layer that reads above itself sees only positions before its own (2410.14442)
    segment      layers that run together: one layer, or a group that iterates because it reads in a circle
    passes       how often a group runs: forward_passes without gradients, then backward_passes with

`# sharing:` marks where an ordinary transformer would differ most."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import kernels
from kernels import Linear
from kv_router import MAX_LAYERS, Plan, PlanError

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MAX_CONTEXT = 1 << 20  # tokens; a damaged file must not make us allocate without bound
PREFILL_CHUNK = 1024  # prompt positions that run through the layers at once, which bounds memory

Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles at T positions, (T, d) each
Sources = tuple[list[Tensor], list[Tensor]]  # the keys and the values that one layer reads


@dataclass(kw_only=True)
class GPTConfig:
    """Sizes, and the plan that the parameters are built for. Raises PlanError for what no model can have.

    Zero stands for a default: n_kv_head = n_head, head_dim = n_embd / n_head, and n_hidden = 8/3 n_embd
    rounded up to a multiple of 32, which gives SwiGLU's three matrices the size of a plain MLP's two."""

    vocab_size: int = 4096
    block_size: int = 256  # the longest context
    n_layer: int = 8
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 128
    head_dim: int = 0
    n_hidden: int = 0
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, see rope_frequencies
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    stop_tokens: list = field(default_factory=list)  # ids that end a text, besides the tokenizer's own
    # sharing:
    plan: str = "full"
    router_lowest: int = 0  # the lowest layer that others were routed to; sweep.py goes no lower
    forward_passes: int = 7
    backward_passes: int = 2

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        can_be_zero = ("head_dim", "n_hidden", "router_lowest", "forward_passes")
        highest = {"n_layer": MAX_LAYERS, "block_size": MAX_CONTEXT, "router_lowest": self.n_layer - 1}
        for name in (f.name for f in fields(self) if f.type is int):
            value = getattr(self, name)
            low = 0 if name in can_be_zero else 1
            high = highest.get(name, (1 << 31) - 1)
            if not low <= value <= high:
                raise PlanError(f"{name} {value} is not valid; it must be {low} to {high}")
        if self.n_embd % self.n_head and not self.head_dim:
            raise PlanError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; change one or set head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or -(-self.n_embd * 8 // 3 // 32) * 32
        if self.head_dim % 2:
            raise PlanError(
                f"head_dim {self.head_dim} is odd; RoPE rotates pairs of features, so it must be even"
            )
        if self.n_head % self.n_kv_head:
            raise PlanError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; change one of them"
            )
        Plan.parse(self.plan, self.n_layer)


# --- layers -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One layer's part of attention: its own keys and values, where some layer reads them, and its queries,
    which read whatever its route names."""

    def __init__(self, config: GPTConfig, plan: Plan, layer: int):
        super().__init__()
        C, nh, nkv, d = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_kv_head, self.head_dim = nkv, d
        # sharing: keys and values that no layer reads have no projection.
        has_k, has_v = layer in plan.k_layers, layer in plan.v_layers
        self.q_proj = Linear(C, nh * d, bias=config.qkv_bias)
        self.k_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_k else None
        self.v_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_v else None
        self.o_proj = Linear(nh * d, C, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm and has_k else None
        # sharing: fusion gates (arXiv 2512.03870). Keys are fused after RoPE, so both features of a rotated
        # pair share a gate: that keeps attention a function of relative position.
        # Gates start as a copy of one source: of the layer's own K and V if they are among the sources,
        # otherwise of the top K and the bottom V as in FusedKV-Lite. An even mixture ends 0.12 nats higher.
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
        """(B, T, heads * d) -> (B, heads, T, d)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def norm_and_rotate(self, x: Tensor, norm: nn.RMSNorm | None, rope: Rope) -> Tensor:
        if norm is not None:
            x = norm(x).type_as(x)  # under autocast it returns float32, and bfloat16 keys must stay bfloat16
        return kernels.rotate(x, *rope)

    def project(self, h: Tensor, rope: Rope, need_q: bool, need_k: bool, need_v: bool):
        """Queries (B, nh, T, d), keys and values (B, nkv, T, d), or None for what is not needed."""
        q = self.norm_and_rotate(self.heads(self.q_proj(h)), self.q_norm, rope) if need_q else None
        k = self.norm_and_rotate(self.heads(self.k_proj(h)), self.k_norm, rope) if need_k else None
        v = self.heads(self.v_proj(h)) if need_v else None
        return q, k, v

    def forward(self, q: Tensor, sources: Sources, past_only: bool, seen: Tensor | None) -> Tensor:
        """What this layer's attention adds to the residual stream, (B, T, C); arguments as in
        `Block.forward`."""
        ks, vs = sources
        k_gate = torch.cat((self.k_gate, self.k_gate), dim=-1) if len(ks) > 1 else None  # (m, nkv, 1, d)
        v_gate = self.v_gate if len(vs) > 1 else None
        if seen is None:
            y = kernels.attention(q, ks, vs, k_gate, v_gate, past_only)  # (B, nh, T, d)
        else:
            y = kernels.decode_attention(q, ks, vs, seen, k_gate, v_gate)  # (B, nh, 1, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), from (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer, in two steps: its queries, keys and values, and attention with the MLP."""

    # sharing: between the two steps, plain Python decides whose K and V the second one reads. So each step is
    # compiled once for all layers and every plan.

    def __init__(self, config: GPTConfig, plan: Plan, layer: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, plan, layer)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def project(self, x: Tensor, rope: Rope, need_q: bool, need_k: bool, need_v: bool):
        """The layer's queries and its own keys and values, as far as they are needed, from x (B, T, C)."""
        return self.attn.project(self.norm1(x), rope, need_q, need_k, need_v)

    def forward(
        self, x: Tensor, q: Tensor, sources: Sources, past_only: bool, seen: Tensor | None = None
    ) -> Tensor:
        """The layer's output (B, T, C), from its input x, its queries, and the keys and values of its route:
        of a whole sequence as in `kernels.attention` or, where `seen` says how many positions are filled,
        blocks of a cache as in `kernels.decode_attention`."""
        x = x + self.attn(q, sources, past_only, seen)
        return x + self.mlp(self.norm2(x))

    def decode(
        self,
        x: Tensor,
        rope: Rope,
        position: Tensor,
        own: tuple,
        sources: Sources,
        past_only: bool,
    ) -> Tensor:
        """Both steps for a single position, x (B, 1, C), over the blocks of a cache, so that they are
        compiled as one. The layer's own K and V go into its blocks `own` first, where some layer reads
        them."""
        q, k, v = self.project(x, rope, True, own[0] is not None, own[1] is not None)
        kernels.write(own, (k, v), position)
        seen = position if past_only else position + 1  # sharing: not its own where it reads above itself
        return self(x, q, sources, past_only, seen)


# --- keys and values by layer -----------------------------------------------------------------------------


class KV:
    """What the layers of one forward pass share: the plan, the angles of RoPE at its positions, and each
    other's keys and values, (B, nkv, T, d) of every stored layer."""

    decoding = False  # a cache that decodes takes one position, and hands out blocks

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rope: Rope | None = None
        self.k: dict[int, Tensor] = {}  # by layer
        self.v: dict[int, Tensor] = {}

    def extend(self, T: int) -> Tensor | slice:
        """Make room for T more positions, whose K and V are `put` next. Returns which these are."""
        return slice(T)

    def put(self, layer: int, k: Tensor | None, v: Tensor | None) -> None:
        self.k[layer], self.v[layer] = k, v

    def sources(self, layer: int) -> Sources:
        """The keys and the values that a layer reads."""
        route = self.plan[layer]  # sharing: an ordinary transformer would always return the layer's own
        return [self.k[j] for j in route.k], [self.v[j] for j in route.v]


class KVCache(KV):
    """The same for generation: up to `max_len` positions of exactly those layers that `plan` stores. `length`
    positions are filled; set it to 0 to use the cache anew. `bytes` is what is allocated.

    Positions lie in whole blocks of kernels.BLOCK: k[i] is (n, B, nkv, BLOCK, d) and v[i] (n, B, nkv, d,
    BLOCK). Decoding sums key times query over features, and weight times value over positions; this way both
    sums run along memory, and filled blocks are a view with the same strides in a cache of any size."""

    def __init__(
        self, config: GPTConfig, plan: Plan, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"
    ):
        super().__init__(plan)
        self.n_blocks = max(2, -(-max_len // kernels.BLOCK))  # two, because torch.compile specializes on one
        shape = (self.n_blocks, batch_size, config.n_kv_head, kernels.BLOCK, config.head_dim)
        v_shape = (*shape[:3], config.head_dim, kernels.BLOCK)
        # sharing: only what the plan stores.
        self.k = {i: torch.zeros(shape, dtype=dtype, device=device) for i in plan.k_layers}
        self.v = {i: torch.zeros(v_shape, dtype=dtype, device=device) for i in plan.v_layers}
        self.max_len, self.length = max_len, 0
        # For decoding: the last position as a tensor; whether all blocks are read, filled or not; and the
        # recorded step, for which they are, see support.devices.CudaGraph.
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.fixed, self.graph = False, None

    @property
    def bytes(self) -> int:
        """What is allocated: whole blocks, for every plan."""
        return sum(t.nbytes for t in (*self.k.values(), *self.v.values()))

    def extend(self, T: int) -> Tensor:
        """T = 1 is decoding: the sources are then views of blocks. Otherwise a prompt, or a part of one, is
        written."""
        self.length += T
        self.position.fill_(self.length - 1)
        self.decoding = T == 1
        self.new = self.position
        if not self.decoding:
            self.new = torch.arange(self.length - T, self.length, device=self.position.device)
        # While decoding: views of the blocks that hold filled positions, or with `fixed` of all blocks.
        n = self.n_blocks if self.fixed else max(2, -(-self.length // kernels.BLOCK))
        self.k_blocks, self.v_blocks = ({i: t[:n] for i, t in stores.items()} for stores in (self.k, self.v))
        for view in (*self.k_blocks.values(), *self.v_blocks.values()):
            torch._dynamo.mark_dynamic(view, 0)  # another number of blocks causes no recompilation
        return self.new

    def put(self, layer: int, k: Tensor | None, v: Tensor | None) -> None:
        """Write a layer's keys and values, (B, nkv, T, d) each, at the new positions."""
        kernels.write((self.k.get(layer), self.v.get(layer)), (k, v), self.new)

    def sources(self, layer: int) -> Sources:
        """The keys and the values that a layer reads: copies, (B, nkv, length, d) each, or while decoding the
        blocks that hold them."""
        route = self.plan[layer]
        if self.decoding:
            return [self.k_blocks[j] for j in route.k], [self.v_blocks[j] for j in route.v]
        ks = [self.k[j].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.length] for j in route.k]
        vs = [self.v[j].permute(1, 2, 0, 4, 3).flatten(2, 3)[:, :, : self.length] for j in route.v]
        return ks, vs


# --- the model --------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only transformer with the parameters that `config.plan` needs. It runs under any plan whose
    sources it has, see `resolve`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.plan = Plan.parse(config.plan, config.n_layer)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, self.plan, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        for block in self.blocks:  # the residual stream is a sum of 2 n_layer outputs
            for proj in (block.attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(proj.weight, std=0.02 * (2 * config.n_layer) ** -0.5)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.rope_table: Rope | None = None
        self.chunk_loss, self.record = kernels.chunk_loss, None  # what kernels.compile_... replace

    @staticmethod
    def init_weights(module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def rope(self, positions: Tensor | slice) -> Rope:
        """Cosines and sines of the angles at T positions, as `kernels.rotate` wants them: (T, d) each. The
        table is made at first use and is no buffer, so that casting the model leaves it in float32: in
        bfloat16 the angles of far positions would be off by whole turns."""
        device = self.embed.weight.device
        if self.rope_table is None or self.rope_table[0].device != device:
            everywhere = torch.arange(self.config.block_size, device=device)
            angles = torch.outer(everywhere, rope_frequencies(self.config).to(device))
            cos, sin = angles.cos(), angles.sin()
            self.rope_table = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        cos, sin = self.rope_table
        return cos[positions], sin[positions]

    def resolve(self, plan: Plan | str | None) -> Plan:
        """The plan to run under, by default the one that the parameters were built for. Raises PlanError
        where the model lacks keys, values or gates that it needs."""
        if plan is None:
            return self.plan
        if isinstance(plan, str):
            plan = Plan.parse(plan, self.config.n_layer)
        lacking = f"plan {plan.spec!r} does not run on this model, built for {self.plan.spec!r}"
        if len(plan) != len(self.plan):
            raise PlanError(f"{lacking}: it is for {len(plan)} layers, and the model has {len(self.plan)}")
        have = {"K": self.plan.k_layers, "V": self.plan.v_layers}
        for i, (built, asked) in enumerate(zip(self.plan.routes, plan.routes)):
            for kind, gated, sources in (("K", built.k, asked.k), ("V", built.v, asked.v)):
                if missing := set(sources) - set(have[kind]):
                    raise PlanError(
                        f"{lacking}: layer {i} reads {kind} of layer {min(missing)}; it has {kind} of layers "
                        f"{have[kind]}"
                    )
                if len(sources) > 1 and sources != gated:
                    raise PlanError(
                        f"{lacking}: layer {i} fuses {kind} of layers {sources}, for which it has no gates; "
                        "train one with --plan"
                    )
        return plan

    # --- through the layers ---

    def project(self, i: int, x: Tensor, kv: KV, need_q: bool = True) -> Tensor | None:
        """Layer i's own K and V, where the plan stores them, go from its input x (B, T, C) into `kv`. Returns
        its queries."""
        q, k, v = self.blocks[i].project(x, kv.rope, need_q, i in kv.plan.k_layers, i in kv.plan.v_layers)
        kv.put(i, k, v)
        return q

    def layer(self, i: int, x: Tensor, kv: KV) -> Tensor:
        """Layer i's output (B, T, C). It reads from `kv` what its route names."""
        past_only = kv.plan.reads_above(i)
        if kv.decoding:
            own = kv.k_blocks.get(i), kv.v_blocks.get(i)
            return self.blocks[i].decode(x, kv.rope, kv.position, own, kv.sources(i), past_only)
        q = self.project(i, x, kv)
        return self.blocks[i](x, q, kv.sources(i), past_only)

    def layers(self, x: Tensor, kv: KV, passes: int | None = None, last_only: bool = False) -> Tensor:
        """From the embeddings x (B, T, C) to the output of the top layer, (B, T, C). With `last_only`, for a
        prompt that goes into a cache, only the last position goes on above the last stored K and V:
        (B, 1, C)."""
        for low, high in kv.plan.segments:
            if low < high:
                x = self.iterate(low, high, x, kv, passes)
            if last_only and high == kv.plan.last_full_layer:
                # sharing: this layer's K and V are the last that anything reads. From here on only the last
                # position matters, so a prompt under FusedKV takes half the layers (arXiv 2512.03870).
                self.project(high, x, kv, need_q=False)
                # A copy, because the strides of a view depend on T, and new strides would compile again.
                x, kv.rope = x.narrow_copy(1, x.size(1) - 1, 1), tuple(angles[-1:] for angles in kv.rope)
                kv.decoding = True  # from here on as in decoding
            x = self.layer(high, x, kv)
        return x

    def iterate(self, low: int, high: int, x: Tensor, kv: KV, passes: int | None) -> Tensor:
        """Run layers low .. high, some of which read KV that higher ones compute later (arXiv 2410.14442).
        Every pass starts from the same x (B, T, C), and takes the KV of the layers above from the pass
        before, at first zeros, until they agree. Returns the input of layer `high`; `layers` runs that layer
        last, like any other.

        `passes`: that many at most, all with gradients; by default forward_passes without gradients, then
        backward_passes with. Without gradients, it stops as soon as nothing changes any more."""
        # sharing: no layer of an ordinary transformer runs twice.
        B, T, _ = x.shape
        training = torch.is_grad_enabled()
        with_gradients = passes or self.config.backward_passes
        # A layer sees only earlier positions of those above it. So position 0 is exact after the first pass,
        # position 1, which reads it, after the second: T passes always suffice. Decoding, where T = 1 and the
        # earlier positions are in the cache, takes one.
        limit = min(T, passes or self.config.forward_passes + with_gradients)
        zeros = x.new_zeros(B, self.config.n_kv_head, T, self.config.head_dim)
        for i in range(low, high + 1):
            kv.put(i, zeros if i in kv.plan.k_layers else None, zeros if i in kv.plan.v_layers else None)
        before = None
        for n in range(1, limit + 1):
            with torch.set_grad_enabled(training and n > limit - with_gradients):
                y = x
                for i in range(low, high):
                    y = self.layer(i, y, kv)
                if n < limit:  # of layer `high`, the next pass needs only what the others read
                    self.project(high, y, kv, need_q=False)
            if not training and before is not None:
                if (y - before).abs().max() <= 4 * torch.finfo(y.dtype).eps * y.abs().max():
                    break  # what is left is rounding
            before = y
        return y

    def hidden(self, idx: Tensor, kv: KV, passes: int | None = None, last_only: bool = False) -> Tensor:
        """The output of the top layer, (B, T, C) or with `last_only` (B, 1, C), of token ids idx (B, T)."""
        kv.rope = self.rope(kv.extend(idx.size(1)))
        return self.layers(self.embed(idx), kv, passes, last_only)

    def head(self, x: Tensor) -> Tensor:
        """Logits of one position, (B, 1, vocab), from the output of the top layer."""
        return self.lm_head(self.norm(x))

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
        ValueError if another plan is asked for, targets, or more positions than fit."""
        if cache is None:
            self.check_fits(idx.size(1), self.config.block_size)
            if targets is not None:
                return None, self.losses(idx, targets, plan).mean()
            return self.head(self.hidden(idx, KV(self.resolve(plan)))[:, -1:]), None
        if targets is not None or self.resolve(plan or cache.plan) != cache.plan:
            raise ValueError(f"this cache is for generation under plan {cache.plan.spec!r}; make another")
        self.check_fits(cache.length + idx.size(1), min(cache.max_len, self.config.block_size))
        with torch.no_grad():
            if idx.size(1) == 1:
                return self.decode(idx, cache), None
            for part in idx.split(PREFILL_CHUNK, dim=1):
                x = self.hidden(part, cache, last_only=True)
            return self.head(x), None

    def check_fits(self, n_positions: int, room: int) -> None:
        """ValueError where more positions are asked for than there is room for."""
        if n_positions > room:
            raise ValueError(
                f"{n_positions} positions do not fit the context of {room}; "
                "shorten the prompt or ask for less"
            )

    def losses(self, idx: Tensor, targets: Tensor, plan: Plan | str | None = None) -> Tensor:
        """The loss of every position, (B, T), in nats."""
        x = self.norm(self.hidden(idx, KV(self.resolve(plan))))
        return kernels.cross_entropy(x, self.lm_head.weight, targets, self.chunk_loss)

    def logits(self, idx: Tensor, plan: Plan | str | None = None, passes: int | None = None) -> Tensor:
        """Logits of every position, (B, T, vocab), for tests and study. A cyclic plan iterates `passes`
        times, by default until it is exact."""
        self.check_fits(idx.size(1), self.config.block_size)
        return self.lm_head(self.norm(self.hidden(idx, KV(self.resolve(plan)), passes or idx.size(1))))

    # --- generation ---

    def decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        """One more position, idx (B, 1) -> logits (B, 1, vocab). Compiled for a GPU, the step is recorded
        once for each cache and then replayed."""
        cache.extend(1)
        if self.record and cache.graph is None:
            cache.graph = self.record(self.step, idx, cache)
        return self.step(idx, cache) if cache.graph is None else cache.graph(idx)

    def step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """The part of `decode` that is recorded: it reads no Python number that changes."""
        cache.rope = self.rope(cache.position)
        return self.head(self.layers(self.embed(idx), cache))

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
        """Continue idx (B, T): the prompt once, then one position a step. Yields each new column, (B, 1).

        Temperature 0 is greedy. A `cache` given is continued from where it is. `exact_prefill` feeds the
        prompt token by token, which for cyclic plans is exact whatever the number of passes. Only the first
        `n_vocab` tokens are drawn, where a model has more of them than its tokenizer. Raises ValueError at
        once, before the first token, where the tokens asked for do not fit the context or the cache."""
        B, T = idx.shape
        before = cache.length if cache else 0
        total = before + T + max_new_tokens
        if T < 1:
            raise ValueError("a prompt needs 1 token at least")
        self.check_fits(total, self.config.block_size)
        if cache is None:
            plan = self.resolve(plan)
            cache = KVCache(self.config, plan, B, total, self.embed.weight.dtype, idx.device)
        self.check_fits(total - 1, cache.max_len)  # the last new token is not fed back
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)

        def tokens() -> Iterator[Tensor]:
            inputs = idx.split(1, dim=1) if exact_prefill else [idx]
            for _ in range(max_new_tokens):
                for part in inputs:
                    logits, _ = self(part, plan=plan, cache=cache)
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
