"""The transformer and its KV cache: Llama-shaped (RMSNorm, RoPE, SwiGLU, grouped-query attention), with one
attention forward for training, prefill and decode under every plan of `kv_router.py`.

Shapes: B sequences, T positions, C = n_embd features, nh query and nkv key/value heads of d features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from kv_router import Plan, PlanError, Shape


@dataclass(kw_only=True)
class GPTConfig(Shape):
    """Sizes (see `kv_router.Shape`) and the plan that the parameters are built for."""

    block_size: int = 256
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, see GPT._set_rope
    norm_eps: float = 1e-5
    plan: str = "full"


PREFILL_CHUNK = 1024  # positions of a prompt that run through the layers at once


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Layer `layer`'s part of attention: its own keys and values where somebody reads them, and its queries,
    which read whatever its route names."""

    def __init__(self, config: GPTConfig, plan: Plan, layer: int):
        super().__init__()
        C, nh, nkv, d = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = nh, nkv, d
        has_k, has_v = layer in plan.k_layers, layer in plan.v_layers
        self.q_proj = Linear(C, nh * d, bias=config.qkv_bias)
        self.k_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_k else None
        self.v_proj = Linear(C, nkv * d, bias=config.qkv_bias) if has_v else None
        self.o_proj = Linear(nh * d, C, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=config.norm_eps) if config.qk_norm and has_k else None
        # Fusion gates (arXiv 2512.03870). Keys are fused after RoPE: one gate for the two features that turn
        # together keeps attention a function of relative position. Where they start matters: at the layer's
        # own K and V if they are among the sources, else, as FusedKV-Lite, keys at the top and values at the
        # bottom one.
        route = plan[layer]
        self.k_gate = self._gate(route.k, layer if layer in route.k else route.k[-1], d // 2)
        self.v_gate = self._gate(route.v, layer if layer in route.v else route.v[0], d)

    def _gate(self, sources: tuple[int, ...], start: int, width: int) -> nn.Parameter | None:
        if len(sources) == 1:
            return None
        one_hot = torch.tensor([float(j == start) for j in sources])
        return nn.Parameter(one_hot[:, None, None, None].repeat(1, self.n_kv_head, 1, width))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, heads * d) -> (B, heads, T, d)

    def _turned(self, x: Tensor, norm: nn.RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = self._heads(x)
        if norm is not None:  # in the type of x, so that bfloat16 keys stay beside bfloat16 values
            x = F.rms_norm(x, norm.normalized_shape, norm.weight.type_as(x), norm.eps)
        return kernels.rotate(x, cos, sin)

    def key(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._turned(self.k_proj(x), self.k_norm, cos, sin)  # (B, nkv, T, d)

    def value(self, x: Tensor) -> Tensor:
        return self._heads(self.v_proj(x))  # (B, nkv, T, d)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        ks: list[Tensor],
        vs: list[Tensor],
        strict: bool,
        seen: Tensor | None,
    ) -> Tensor:
        q = self._turned(self.q_proj(x), self.q_norm, cos, sin)  # (B, nh, T, d)
        k_gate = torch.cat((self.k_gate, self.k_gate), dim=-1) if len(ks) > 1 else None
        v_gate = self.v_gate if len(vs) > 1 else None
        if seen is None:
            y = kernels.attention(q, ks, vs, k_gate, v_gate, strict)  # (B, nh, T, d)
        else:
            y = kernels.decode_attention(q, ks, vs, seen - int(strict), k_gate, v_gate)  # (B, nh, 1, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, in two steps, so that which KV the second reads is plain Python between compiled pieces."""

    def __init__(self, config: GPTConfig, plan: Plan, layer: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, plan, layer)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def kv(self, x: Tensor, cos: Tensor, sin: Tensor, need_k: bool, need_v: bool):
        """The layer's normed input and its own keys and values, as far as somebody reads them."""
        h = self.norm1(x)
        return h, self.attn.key(h, cos, sin) if need_k else None, self.attn.value(h) if need_v else None

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        ks: list[Tensor],
        vs: list[Tensor],
        strict: bool,
        seen: Tensor | None = None,
    ) -> Tensor:
        """The layer's output (B, T, C) from its input x, and h = norm1(x): attention over the sources ks and
        vs as in `kernels.attention` or, given the number of positions `seen`, over the cache as in
        `kernels.decode_attention`; then the MLP."""
        x = x + self.attn(h, cos, sin, ks, vs, strict, seen)
        return x + self.mlp(self.norm2(x))

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: tuple[Tensor, Tensor],
        k_store: Tensor | None,
        v_store: Tensor | None,
        ks: list[Tensor],
        vs: list[Tensor],
        strict: bool,
        seen: Tensor,
    ) -> Tensor:
        """Both steps for a single position, x (B, 1, C), with a cache: what others read of this layer goes to
        its `place` in the stores, and the sources are the cache's."""
        h, k, v = self.kv(x, cos, sin, k_store is not None, v_store is not None)
        kernels.write(k_store, v_store, k, v, *place)
        return self(x, h, cos, sin, ks, vs, strict, seen)


class KVCache:
    """The keys and values of up to `max_len` positions, for exactly the layers that `plan` stores, filled
    below position `length`; in whole blocks of kernels.BLOCK positions, at least two.

    `k[i]`: (n, B, nkv, BLOCK, d) and `v[i]`: (n, B, nkv, d, BLOCK), so that decode, which sums key times
    query over features and weight times value over positions, sums along memory. `bytes` is what is
    allocated. `passes` and `change`: how often a cyclic plan's layers ran over the last prompt, and by how
    much, relative to the largest, the last pass still changed their KV; the worst of its groups."""

    def __init__(
        self, config: GPTConfig, plan: Plan, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"
    ):
        n = max(2, -(-max_len // kernels.BLOCK))
        shape = (n, batch_size, config.n_kv_head, kernels.BLOCK, config.head_dim)
        self.plan, self.max_len, self.length = plan, max_len, 0
        self.passes, self.change = 1, 0.0
        self.position, self.graph = None, None  # see kernels.CudaGraph
        self.k = {i: torch.zeros(shape, dtype=dtype, device=device) for i in plan.k_layers}
        self.v = {
            i: torch.zeros(*shape[:3], *shape[:2:-1], dtype=dtype, device=device) for i in plan.v_layers
        }

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.k.values(), *self.v.values()))

    def positions(self, T: int, device: torch.device) -> Tensor:
        """The next T positions, (T,)."""
        if T == 1 and self.position is not None:
            return self.position
        return torch.arange(self.length, self.length + T, device=device)

    def blocks(self, end: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Views of the blocks that hold positions 0 .. end - 1 of every stored layer's keys and values."""
        n = max(2, -(-end // kernels.BLOCK)) if self.position is None else None
        return tuple({i: kernels.first_blocks(t, n) for i, t in x.items()} for x in (self.k, self.v))

    def read(self, layer: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Copies of a layer's keys and values of positions 0 .. end - 1, (B, nkv, end, d) each."""
        k, v = self.k.get(layer), self.v.get(layer)
        return (
            None if k is None else k.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end],
            None if v is None else v.permute(1, 2, 0, 4, 3).flatten(2, 3)[:, :, :end],
        )


def listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.plan = Plan.parse(config.plan, config.n_layer)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, self.plan, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for block in self.blocks:  # the residual stream sums 2 n_layer outputs
            for proj in (block.attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(proj.weight, std=0.02 * (2 * config.n_layer) ** -0.5)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self._set_rope()
        self.compiled, self.loss_chunk = False, kernels.loss_chunk  # see kernels.compile_decode, _model

    def _set_rope(self):
        c = self.config
        frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        if s := c.rope_scaling:  # Llama 3: slow turns get slower by `factor`, fast ones stay, a ramp between
            turns = s["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = keep * frequencies + (1 - keep) * frequencies / s["factor"]
        angles = torch.outer(torch.arange(c.block_size), frequencies).to(self.embed.weight.device)
        self.cos, self.sin = angles.cos(), angles.sin()  # (block_size, d/2)

    def _apply(self, *args):
        """Moving or casting the model moves the RoPE table and leaves it in float32: in bfloat16 the angles
        of far positions would be off by whole turns."""
        super()._apply(*args)
        self._set_rope()
        return self

    @staticmethod
    def _init_weights(module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def resolve(self, plan: Plan | str | None) -> Plan:
        """The plan to run under, by default the one the parameters were built for. Raises PlanError when the
        model lacks what the plan needs."""
        if plan is None:
            plan = self.plan
        elif isinstance(plan, str):
            plan = Plan.parse(plan, self.config.n_layer)
        if len(plan) != self.config.n_layer:
            raise PlanError(
                f"plan {plan.spec!r} is for {len(plan)} layers and the model has {self.config.n_layer}"
            )
        self.check_sources(plan)
        for i, (built, asked) in enumerate(zip(self.plan.routes, plan.routes)):
            for kind, gates, want in (("K", built.k, asked.k), ("V", built.v, asked.v)):
                if len(want) > 1 and want != gates:
                    raise PlanError(
                        f"plan {plan.spec!r}: layer {i} fuses the {kind} of layers {listed(want)}, and this "
                        f"model, built for {self.plan.spec!r}, has no gates for that; train one with --plan"
                    )
        return plan

    def check_sources(self, plan: Plan) -> None:
        """Raise PlanError when the plan reads keys or values that the model does not compute."""
        for i, route in enumerate(plan.routes):
            for kind, have, want in (("K", self.plan.k_layers, route.k), ("V", self.plan.v_layers, route.v)):
                if missing := set(want) - set(have):
                    raise PlanError(
                        f"plan {plan.spec!r}: layer {i} reads {kind} of layer {min(missing)}, which this "
                        f"model, built for {self.plan.spec!r}, does not compute; it has {kind} of layers "
                        f"{listed(have)}"
                    )

    def hidden(
        self,
        idx: Tensor,
        plan: Plan,
        cache: KVCache | None = None,
        outputs: int | None = None,
        passes: int | None = None,
    ) -> Tensor | None:
        """The residual stream above the last layer, (B, T, C), or only the last position's, (B, 1, C), with
        outputs=1, or none's with outputs=0: nothing above the highest stored layer needs the other positions,
        so there they stop.

        Layers bound by reads of higher ones (`plan.segments`) iterate, all passes from the same input, each
        reading the higher layers' KV of the pass before and the first one zeros (arXiv 2410.14442): at most
        `passes` times, all with gradients, or by default forward_passes without and backward_passes with.
        After pass n the first n positions are exact, so T passes, or one of a single position, always
        suffice; without gradients iteration stops when the KV has settled."""
        c = self.config
        B, T = idx.shape
        self._check_fits(T, cache)
        start = cache.length if cache is not None else 0
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T, idx.device)
        place = positions // kernels.BLOCK, positions % kernels.BLOCK
        cos, sin, seen = self.cos[positions], self.sin[positions], positions[-1] + 1
        ks, vs = {}, {}  # layer -> its keys, values, (B, nkv, start + T, d)
        grad = torch.is_grad_enabled()

        def put(i: int, k: Tensor | None, v: Tensor | None):
            if cache is not None:
                kernels.write(cache.k.get(i), cache.v.get(i), k, v, *place)
            ks[i], vs[i] = (k, v) if start == 0 else cache.read(i, start + T)

        def own_kv(i: int, x: Tensor) -> Tensor:
            h, k, v = self.blocks[i].kv(x, cos, sin, i in plan.k_layers, i in plan.v_layers)
            put(i, k, v)
            return h

        def finish(i: int, x: Tensor, h: Tensor) -> Tensor:
            k, v = [ks[j] for j in plan[i].k], [vs[j] for j in plan[i].v]
            return self.blocks[i](x, h, cos, sin, k, v, plan.strict(i))

        x = self.embed(idx)  # (B, T, C)
        # Layers that run for the last position alone, over the cache. All of them for a single one, once and
        # in order under every plan: what lies above is read of positions before it.
        alone = range(c.n_layer) if cache is not None and T == 1 else range(0)
        for lo, hi in () if alone else plan.segments:
            limit, without = 1, 0
            if lo < hi:
                limit = min(T, passes or c.forward_passes + c.backward_passes)
                without = limit - min(limit, passes or c.backward_passes)
                none = x.new_zeros(B, c.n_kv_head, T, c.head_dim)
                for i in range(lo, hi + 1):
                    put(i, none if i in plan.k_layers else None, none if i in plan.v_layers else None)
            first = x
            for n in range(limit):
                before = None if grad or lo == hi else self._new_kv(ks, vs, lo, hi, T)
                with torch.set_grad_enabled(grad and n >= without):
                    x = first
                    for i in range(lo, hi):
                        x = finish(i, x, own_kv(i, x))
                    h = own_kv(hi, x)
                if before is not None:
                    change = (self._new_kv(ks, vs, lo, hi, T) - before).abs().max() / before.abs().max()
                    if change <= 4 * torch.finfo(before.dtype).eps:
                        break
            if before is not None and cache is not None:
                cache.passes, cache.change = max(cache.passes, n + 1), max(cache.change, float(change))
            if outputs is not None and hi == plan.last_full_layer:
                x, h = (t.narrow_copy(1, T - 1, 1) for t in (x, h))  # a view's strides would tell T apart
                cos, sin = cos[-1:], sin[-1:]
                if cache is not None:
                    alone = range(hi, c.n_layer if outputs else hi)
                    break
            x = finish(hi, x, h)
        if alone:
            k, v = cache.blocks(start + T)
        for i in alone:
            own = (k.get(i), v.get(i)) if T == 1 else (None, None)  # a prompt's are there already
            sources = [k[j] for j in plan[i].k], [v[j] for j in plan[i].v]
            x = self.blocks[i].step(x, cos, sin, place, *own, *sources, plan.strict(i), seen)
        if cache is not None:
            cache.length = start + T
        return None if outputs == 0 else x

    def _check_fits(self, T: int, cache: KVCache | None):
        start, room = 0, self.config.block_size
        if cache is not None:
            start, room = cache.length, min(cache.max_len, room)
        if start + T > room:
            raise ValueError(
                f"{start + T} positions do not fit the context of {room}; shorten the prompt or ask for less"
            )

    @staticmethod
    def _new_kv(ks: dict, vs: dict, lo: int, hi: int, T: int) -> Tensor:
        """A copy of the last T positions of all keys and values of layers lo .. hi."""
        stored = [x[i] for x in (ks, vs) for i in range(lo, hi + 1) if x[i] is not None]
        return torch.stack([t[:, :, -T:] for t in stored])

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
        ValueError if another is asked for, or targets."""
        plan = self.resolve(cache.plan if plan is None and cache is not None else plan)
        if cache is not None and (targets is not None or plan != cache.plan):
            raise ValueError(f"this cache is for generation under plan {cache.plan.spec!r}; make another")
        if targets is not None:
            x = self.norm(self.hidden(idx, plan))
            return None, kernels.mean_cross_entropy(x, self.lm_head.weight, targets, self.loss_chunk)
        if cache is not None:
            self._check_fits(idx.size(1), cache)
            if idx.size(1) > 1:
                cache.passes, cache.change = 1, 0.0
            *parts, idx = idx.split(PREFILL_CHUNK, dim=1)
            for part in parts:
                self.hidden(part, plan, cache, outputs=0)
        return self.head(self.hidden(idx, plan, cache, outputs=1)), None

    def head(self, x: Tensor) -> Tensor:
        """Logits of a position, (B, 1, vocab), from the residual stream."""
        return self.lm_head(self.norm(x))

    def losses(self, idx: Tensor, targets: Tensor, plan: Plan | str | None = None) -> Tensor:
        """Loss of every position, (B, T), in nats."""
        x = self.norm(self.hidden(idx, self.resolve(plan)))
        return kernels.cross_entropy(x, self.lm_head.weight, targets, self.loss_chunk)

    def logits(self, idx: Tensor, plan: Plan | str | None = None, passes: int | None = None) -> Tensor:
        """Logits of every position, (B, T, vocab), without a cache. A cyclic plan iterates `passes` times, by
        default until it is exact; passes below 1 raise ValueError."""
        if passes is not None and passes < 1:
            raise ValueError(f"passes {passes} is not valid; it must be 1 or more")
        return self.lm_head(self.norm(self.hidden(idx, self.resolve(plan), passes=passes or idx.size(1))))

    @torch.no_grad()
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
    ) -> Iterator[Tensor]:
        """Continue idx (B, T): prefill once, then one position a step with the cache. Yields each new column
        (B, 1). Temperature 0 is greedy. `exact_prefill` feeds the prompt token by token, which for cyclic
        plans is the exact result whatever the number of passes. Raises ValueError when T + max_new_tokens
        exceeds the context."""
        B, T = idx.shape
        if T < 1 or T + max_new_tokens > self.config.block_size:
            raise ValueError(
                f"a prompt of {T} tokens and {max_new_tokens} new ones do not fit the context of "
                f"{self.config.block_size} tokens (1 prompt token at least)"
            )
        plan = self.resolve(cache.plan if plan is None and cache is not None else plan)
        if cache is not None and cache.length + T + max_new_tokens - 1 > cache.max_len:
            raise ValueError(
                f"{T} tokens and {max_new_tokens} new ones do not fit a cache of {cache.max_len} positions, "
                f"{cache.length} of them taken; make a longer one"
            )
        if cache is None:
            cache = KVCache(self.config, plan, B, T + max_new_tokens, self.embed.weight.dtype, idx.device)

        def step(idx: Tensor) -> Tensor:
            return self(idx, plan=plan, cache=cache)[0]

        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        for t in range(T - 1 if exact_prefill else 0):
            step(idx[:, t : t + 1])
        idx = idx[:, -1:] if exact_prefill else idx
        for n in range(max_new_tokens):
            if n > 0 and self.compiled and idx.is_cuda:
                cache.graph = cache.graph or kernels.CudaGraph(self, cache, idx)
                step = partial(cache.graph, cache)
            logits = step(idx)[:, -1].float()  # (B, vocab)
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -torch.inf)
                idx = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            yield idx

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """`stream` in one piece: (B, T) -> (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **options)], dim=1)


@torch.no_grad()
def convert(model: GPT, plan: str, calibration: Iterable[Tensor] = ()) -> GPT:
    """A model built for `plan` with the weights of `model`; projections that no one reads any more go.

    Gates of fused layers are the least-squares fit of the layer's own K and V on those of its sources over
    the `calibration` batches of token ids, (B, T) each: one small linear system per head and feature, for
    keys per pair of features that RoPE turns together. Without calibration they start as in a new model.
    Raises PlanError where `model` lacks what the plan reads."""
    config = replace(model.config, plan=plan)
    new = GPT(config).to(model.embed.weight)
    model.check_sources(new.plan)
    weights = model.state_dict()
    new.load_state_dict({n: weights.get(n, p) for n, p in new.state_dict().items()})
    sums = {}  # (layer, which) -> [A, b] of the normal equations A gate = b
    for idx in calibration:
        cache = KVCache(model.config, model.plan, *idx.shape, model.embed.weight.dtype, idx.device)
        model(idx, cache=cache)
        kv = {i: cache.read(i, cache.length) for i in range(config.n_layer)}
        for i, route in enumerate(new.plan.routes):
            for which, sources in enumerate((route.k, route.v)):
                if len(sources) == 1 or kv[i][which] is None:
                    continue
                x, y = torch.stack([kv[j][which] for j in sources]).double(), kv[i][which].double()
                if which == 0:  # the two halves of a head are further samples of the same gates
                    x, y = (torch.cat(t.chunk(2, dim=-1), dim=-2) for t in (x, y))
                A, b = torch.einsum("mbhtd,nbhtd->hdmn", x, x), torch.einsum("mbhtd,bhtd->hdm", x, y)
                old = sums.get((i, which), (0, 0))
                sums[i, which] = (old[0] + A, old[1] + b)
    for (i, which), (A, b) in sums.items():
        ridge = 1e-6 * A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(A.size(-1)).to(A)
        gate = torch.linalg.solve(A + ridge, b)  # (nkv, d or d/2, m)
        attn = new.blocks[i].attn
        (attn.k_gate, attn.v_gate)[which].copy_(gate.permute(2, 0, 1)[:, :, None])
    return new.eval()
