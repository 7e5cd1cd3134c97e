"""The model against a slow, obvious reference: float32, one position at a time, everything materialised."""

import math

import kernels
import model as model_module
from kv_router import Plan, PlanError, StochasticRouter
from model import GPT, GPTConfig, KVCache
from support.costs import costs

import pytest
import torch
import torch._dynamo
from conftest import acyclic_plans, make_model

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, logits of order 10


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def turn(x, position, theta):
    """RoPE by complex numbers: x (heads, d), feature j with feature j + d/2."""
    d = x.size(-1)
    angles = position * theta ** (-torch.arange(0, d, 2) / d)
    z = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * torch.polar(torch.ones(d // 2), angles)
    return torch.cat((z.real, z.imag), dim=-1)


@torch.no_grad()
def reference_logits(model: GPT, ids: list[int], plan: Plan) -> torch.Tensor:
    """Every position's logits (T, vocab), token by token, layer by layer, head by head."""
    c = model.config
    K, V = {}, {}  # (layer, position) -> (n_kv_head, d)
    rows = []
    for t, token in enumerate(ids):
        x = model.embed.weight[token]
        for i, block in enumerate(model.blocks):
            a = block.attn
            h = norm(x, block.norm1.weight, c.norm_eps)
            if a.k_proj is not None:
                k = a.k_proj(h).view(c.n_kv_head, c.head_dim)
                k = torch.stack([norm(row, a.k_norm.weight, c.norm_eps) for row in k]) if c.qk_norm else k
                K[i, t] = turn(k, t, c.rope_theta)
            if a.v_proj is not None:
                V[i, t] = a.v_proj(h).view(c.n_kv_head, c.head_dim)
            q = a.q_proj(h).view(c.n_head, c.head_dim)
            q = torch.stack([norm(row, a.q_norm.weight, c.norm_eps) for row in q]) if c.qk_norm else q
            q = turn(q, t, c.rope_theta)

            def fused(store, sources, gate, doubled, t):
                if len(sources) == 1:
                    return store[sources[0], t]
                gate = gate[:, :, 0]  # (m, n_kv_head, d or d/2)
                gate = torch.cat((gate, gate), dim=-1) if doubled else gate
                return sum(g * store[j, t] for g, j in zip(gate, sources))

            # whoever reads a layer above itself sees only positions whose KV is there already
            seen = range(t if max(plan[i].k + plan[i].v) > i else t + 1)
            ks = [fused(K, plan[i].k, a.k_gate, True, s) for s in seen]
            vs = [fused(V, plan[i].v, a.v_gate, False, s) for s in seen]
            heads = []
            for head in range(c.n_head):
                if not ks:
                    heads.append(torch.zeros(c.head_dim))
                    continue
                g = head // (c.n_head // c.n_kv_head)
                weights = torch.softmax(
                    torch.stack([q[head] @ k[g] for k in ks]) / math.sqrt(c.head_dim), dim=0
                )
                heads.append(sum(w * v[g] for w, v in zip(weights, vs)))
            x = x + a.o_proj(torch.cat(heads))
            h, m = norm(x, block.norm2.weight, c.norm_eps), block.mlp
            x = x + m.down_proj(torch.nn.functional.silu(m.gate_proj(h)) * m.up_proj(h))
        rows.append(model.lm_head(norm(x, model.norm.weight, c.norm_eps)))
    return torch.stack(rows)


def tokens(B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed))


CASES = [(n, spec) for n in (1, 2, 3, 4, 7) for spec in acyclic_plans(n)]
HEADS = [(4, 4, 8), (4, 2, 8), (4, 1, 8), (3, 3, 16), (6, 2, 4)]  # n_head, n_kv_head, head_dim: MHA, GQA, MQA


@pytest.mark.parametrize("n_layer, spec", CASES)
def test_forward_equals_the_reference(n_layer, spec):
    model = make_model(spec, n_layer=n_layer, qk_norm=n_layer == 3, tie_embeddings=n_layer != 4)
    idx = tokens(1, 9)
    torch.testing.assert_close(
        model.logits(idx)[0], reference_logits(model, idx[0].tolist(), model.plan), **CLOSE
    )


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
@pytest.mark.parametrize("spec", ["full", "cla:2", "fusedkv", "fusedkv-lite", "0_1_k0v0+1_k0+1+2v1"])
def test_forward_equals_the_reference_for_all_head_counts(spec, n_head, n_kv_head, head_dim):
    model = make_model(spec, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, qkv_bias=True)
    idx = tokens(1, 7)
    torch.testing.assert_close(
        model.logits(idx)[0], reference_logits(model, idx[0].tolist(), model.plan), **CLOSE
    )


def cached_logits(model, idx, plan, splits) -> torch.Tensor:
    """The last logits after each piece of idx (cut at `splits`) and then after every single position."""
    T = idx.size(1)
    cache = KVCache(model.config, plan, idx.size(0), T)
    edges = [0, *splits, *range(splits[-1] + 1, T + 1)]
    out = [model(idx[:, a:b], plan=plan, cache=cache)[0] for a, b in zip(edges, edges[1:])]
    assert cache.length == T
    return torch.cat(out, dim=1), [b - 1 for b in edges[1:]]


@torch.no_grad()
@pytest.mark.parametrize("n_layer, spec", CASES)
def test_prefill_and_decode_equal_the_full_forward(n_layer, spec):
    """From every split, so also from a prompt of one token, and when a second prompt joins a filled cache."""
    model = make_model(spec, n_layer=n_layer)
    idx = tokens(2, 8)
    expected = model.logits(idx)
    for splits in [(s,) for s in range(1, 9)] + [(1, 4), (3, 5, 8)]:
        got, positions = cached_logits(model, idx, model.plan, splits)
        torch.testing.assert_close(got, expected[:, positions], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_checkpoint_under_every_plan(n_head, n_kv_head, head_dim, batch):
    """A model built with all layers' KV runs cached under every unfused plan, also random ones."""
    model = make_model(n_layer=5, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    idx = tokens(batch, 8)
    plans = [Plan.parse(s, 5) for s in ("full", "cla:2", "yoco", "fusedkv-lite", "keep:0,4", "keep:0")]
    plans += [StochasticRouter(5, 0.6).plan(step) for step in range(5)]
    logits = [model.logits(idx, plan) for plan in plans]
    for plan, expected in zip(plans, logits):
        got, positions = cached_logits(model, idx, plan, (3,))
        torch.testing.assert_close(got, expected[:, positions], **CLOSE)
    assert (logits[0] - logits[1]).abs().max() > 0.1  # plans do differ


@torch.no_grad()
@pytest.mark.parametrize("n_layer, spec", CASES)
def test_a_later_token_changes_no_earlier_logit(n_layer, spec):
    model = make_model(spec, n_layer=n_layer)
    idx = tokens(1, 10)
    before = model.logits(idx)
    for t in (1, 5, 9):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model.logits(changed)
        assert torch.equal(before[:, :t], after[:, :t]) or torch.allclose(
            before[:, :t], after[:, :t], atol=1e-6
        )
        assert not torch.allclose(before[:, t], after[:, t], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["full", "fusedkv", "fusedkv-lite", "cla:2"])
def test_shifting_all_positions_changes_nothing(spec):
    model = make_model(spec, block_size=64)
    idx = tokens(1, 12)
    at_zero = model.logits(idx)
    rope = model.rope
    model.rope = lambda positions: rope(slice(31, 31 + positions.stop))
    torch.testing.assert_close(model.logits(idx), at_zero, **CLOSE)


@torch.no_grad()
def test_untied_key_gates_would_depend_on_position():
    """The reason for one gate per rotated pair, and proof that the test above can fail."""
    model = make_model("fusedkv", block_size=64)
    gates = torch.randn(2, 2, 1, 8)
    x = [torch.randn(1, 2, 6, 8) for _ in range(3)]

    def scores(start, gates):
        rope = model.rope(torch.arange(start, start + 6))
        q, *ks = (kernels.rotate(y, *rope) for y in x)
        return q @ kernels.fuse(ks, gates).transpose(-1, -2)

    tied = torch.cat((gates[..., :4], gates[..., :4]), dim=-1)
    torch.testing.assert_close(scores(0, tied), scores(31, tied), **CLOSE)
    assert not torch.allclose(scores(0, gates), scores(31, gates), atol=1e-2)


def test_gates_start_at_lites_point():
    fused = GPT(GPTConfig(plan="fusedkv", n_layer=4, vocab_size=61))
    lite = GPT(GPTConfig(plan="fusedkv-lite", n_layer=4, vocab_size=61))
    missing = lite.load_state_dict(fused.state_dict(), strict=False)
    assert not missing.missing_keys and len(missing.unexpected_keys) == 4
    idx = tokens(2, 6)
    torch.testing.assert_close(fused.logits(idx), lite.logits(idx))
    own = GPT(GPTConfig(plan="0_k1v0+1", n_layer=2, vocab_size=61))  # a value residual starts as itself
    assert own.blocks[1].attn.v_gate[:, 0, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("n_layer, spec", CASES)
def test_parameters_and_cache_are_what_the_cost_model_says(n_layer, spec):
    for sizes in ({}, {"tie_embeddings": False, "qk_norm": True, "qkv_bias": True, "head_dim": 6}):
        model = make_model(spec, n_layer=n_layer, **sizes)
        predicted = costs(model.plan, model.config, bytes_per_value=4)
        assert sum(p.numel() for p in model.parameters()) == predicted.params
        cache = KVCache(model.config, model.plan, batch_size=3, max_len=300)  # in whole blocks: 384
        full = KVCache(model.config, Plan.parse("full", n_layer), batch_size=3, max_len=300)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*cache.k.values(), *cache.v.values()]
        }
        assert cache.bytes == sum(storages.values()) == 3 * 384 * predicted.cache_bytes_per_token
        assert cache.bytes == full.bytes * model.plan.cache_ratio


def test_every_parameter_learns():
    """No dead weights: under its own plan each parameter gets a gradient, so no projection is unread."""
    for n_layer, spec in CASES:
        model = make_model(spec, n_layer=n_layer)
        idx = tokens(2, 8)
        model(idx, idx)[1].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()), spec


@torch.no_grad()
def test_kv_that_no_one_reads_is_not_computed():
    model = make_model(n_layer=4)
    calls = []
    for i, block in enumerate(model.blocks):
        block.attn.k_proj.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.logits(tokens(1, 4), "keep:0,2")
    assert calls == [0, 2]


@pytest.mark.parametrize("G, d", [(1, 16), (2, 64), (4, 128), (3, 32)])
@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("S", [1, 2, 127, 128, 129, 300])
def test_folded_attention_over_blocks_equals_materialised(G, d, n_sources, S):
    """Every stored position beyond the first S holds rubbish, which must not be seen."""
    torch.manual_seed(S)
    q = torch.randn(2, 2 * G, 1, d)
    ks, vs = ([torch.randn(2, 2, 3 * kernels.BLOCK, d) for _ in range(n_sources)] for _ in range(2))
    a, b = (torch.randn(n_sources, 2, 1, d) if n_sources > 1 else None for _ in range(2))
    k = sum(g * x for g, x in zip(a, ks)) if n_sources > 1 else ks[0]
    v = sum(g * x for g, x in zip(b, vs)) if n_sources > 1 else vs[0]
    k, v = (x[:, :, :S].repeat_interleave(G, dim=1) for x in (k, v))
    expected = torch.softmax(q @ k.transpose(-1, -2) / d**0.5, dim=-1) @ v
    blocks = [torch.stack(x.split(kernels.BLOCK, dim=2)) for x in ks + vs]
    k_blocks, v_blocks = blocks[:n_sources], [x.mT.contiguous() for x in blocks[n_sources:]]
    got = kernels.decode_attention(q, k_blocks, v_blocks, torch.tensor(S), a, b)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    nothing = kernels.decode_attention(q, k_blocks, v_blocks, torch.tensor(0), a, b)
    assert torch.equal(nothing, torch.zeros_like(q))


FAMILIES = ["full", "cla:2", "yoco", "fusedkv", "fusedkv-lite", "keep:0,3", "0_1_k0v0+1_k0+1+2v1"]


@torch.no_grad()
@pytest.mark.parametrize("spec", FAMILIES)
@pytest.mark.parametrize("length", [15, 16, 17, 32, 33])
def test_a_prompt_in_chunks_equals_the_full_forward(spec, length, monkeypatch):
    """Around the borders of chunks; also when a second prompt joins, and when chunks are single tokens."""
    model = make_model(spec, block_size=64)
    idx = tokens(2, length + 5)
    expected = model.logits(idx)
    for chunk, first in ((16, length), (16, 3), (1, length)):
        monkeypatch.setattr("model.PREFILL_CHUNK", chunk)
        cache = KVCache(model.config, model.plan, 2, length + 5)
        for a, b in ((0, first), (first, length), *((t, t + 1) for t in range(length, length + 5))):
            if a < b:
                got = model(idx[:, a:b], cache=cache)[0]
                torch.testing.assert_close(got[:, 0], expected[:, b - 1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["full", "fusedkv"])
def test_decode_across_the_blocks_of_the_cache(spec):
    model = make_model(spec, block_size=400)
    idx = tokens(2, 400)
    expected = model.logits(idx)
    for start in (1, 126, 254, 255, 256, 382):
        cache = KVCache(model.config, model.plan, 2, 400)
        cache.k = {i: torch.full_like(t, 1e4) for i, t in cache.k.items()}  # a cache used before
        model(idx[:, :start], cache=cache)
        for t in range(start, start + 4):
            got = model(idx[:, t : t + 1], cache=cache)[0]
            torch.testing.assert_close(got[:, 0], expected[:, t], **CLOSE)


def test_a_long_prompt_needs_bounded_memory():
    """The largest tensor of a prefill, cache aside, grows with the chunk and not with the prompt."""
    largest = {}
    for length in (2048, 4096):
        model = make_model("yoco", block_size=4096, n_hidden=1024)
        seen = []
        for block in model.blocks:
            block.mlp.up_proj.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].numel()))
        model.generate(tokens(1, length - 1), 1)
        largest[length] = max(seen)
    assert largest[2048] == largest[4096] == 1024 * model_module.PREFILL_CHUNK


# Beyond its limit torch would quietly run uncompiled, and count nothing: here it fails.
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
@torch.no_grad()
def test_compiled_decode_equals_uncompiled_and_never_compiles_again():
    """Every attention form, over block borders; then other prompts, lengths and caches of the same plans."""
    for spec, B in (("fusedkv", 2), ("sandwich-middle:2", 1), ("shared-v", 1)):
        idx = tokens(B, 320)
        model = make_model(spec, block_size=320, qkv_bias=True, qk_norm=True)
        expected = model.generate(idx[:, :124], 140, temperature=0)
        kernels.compile_decoding(model)
        assert torch.equal(model.generate(idx[:, :124], 140, temperature=0), expected)
        cache = KVCache(model.config, model.plan, B, 320)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for length, n in ((1, 3), (130, 4), (255, 60)):
            model.generate(idx[:, :length], n)
        for part in (idx[:, :250], *idx[:, 250:262].split(1, dim=1)):
            got = model(part, cache=cache)[0]
        if not model.plan.cyclic:
            torch.testing.assert_close(got[:, 0], model.logits(idx[:, :262])[:, -1], **CLOSE)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.parametrize("plan", acyclic_plans(4))
def test_the_last_logits_without_a_cache(plan):
    model, idx = make_model(plan), tokens(2, 9)
    torch.testing.assert_close(model(idx)[0][:, 0], model.logits(idx)[:, -1])


def test_loss_is_the_cross_entropy_of_the_logits():
    model = make_model("fusedkv")
    idx, targets = tokens(2, 8), tokens(2, 8, seed=2)
    log_p = model.logits(idx).log_softmax(-1)
    expected = torch.stack([torch.stack([-log_p[b, t, targets[b, t]] for t in range(8)]) for b in range(2)])
    torch.testing.assert_close(model.losses(idx, targets), expected)
    torch.testing.assert_close(model(idx, targets)[1], expected.mean())


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_loss_by_chunks_has_the_gradients_of_the_whole(rows, monkeypatch):
    """With a gradient from above that is not one; and no more logits at a time than a chunk's."""
    monkeypatch.setattr(kernels, "LOGITS", 61 * rows)
    torch.manual_seed(0)
    x, w = torch.randn(2, 9, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    targets, sizes = tokens(2, 9), []

    def chunk(h, weight, t):
        sizes.append(len(h))
        return kernels.chunk_loss(h, weight, t)

    (3 * kernels.cross_entropy(x, w, targets, chunk).mean()).backward()
    got = x.grad, w.grad
    x.grad = w.grad = None
    (3 * torch.nn.functional.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten())).backward()
    torch.testing.assert_close(got, (x.grad, w.grad))
    assert max(sizes) == min(rows, 18) and sum(sizes) in (18, 36)  # twice where there are several


@pytest.mark.parametrize(
    "built, asked, part",
    [
        ("fusedkv", "full", "built for 'fusedkv': layer 2 reads K of layer 2; it has K of layers"),
        ("full", "fusedkv", "layer 2 fuses K of layers (0, 1), for which it has no gates"),
        ("0_1_2_k1v0+1", "0_1_2_k2v0+2", "for which it has no gates"),
        ("cla:2", "keep:0,1", "layer 1 reads K of layer 1"),
        ("pizza-top:2", "full", "layer 1 reads K of layer 1"),
        ("full", "keep:0,7", "layer '7'"),
    ],
)
def test_plans_the_model_cannot_run(built, asked, part):
    model = make_model(built)
    with pytest.raises(PlanError) as e:
        model.logits(tokens(1, 4), asked)
    assert part in str(e.value) and "\n" not in str(e.value)


def test_a_fused_model_runs_unfused_plans_over_its_sources():
    model = make_model("fusedkv")
    lite, fused = (model.logits(tokens(1, 6), plan) for plan in ("fusedkv-lite", "fusedkv"))
    assert not torch.allclose(lite, fused, atol=1e-2)


def test_greedy_generation_equals_the_argmax_of_full_forwards():
    for spec in ("full", "cla:2", "fusedkv", "fusedkv-lite"):
        model = make_model(spec)
        idx = tokens(2, 3)
        expected = idx
        for _ in range(10):
            expected = torch.cat((expected, model.logits(expected)[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(model.generate(idx, 10, temperature=0), expected)


def test_sampling_follows_seed_temperature_and_top_k():
    model = make_model()
    idx = tokens(1, 3).repeat(64, 1)
    a, b, c = (model.generate(idx, 6, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    columns = list(model.stream(idx, 6, temperature=1.0, seed=0))
    assert torch.equal(torch.cat([idx, *columns], dim=1), a)
    best = set(model.logits(idx[:1])[0, -1].topk(3).indices.tolist())
    drawn = set(model.generate(idx, 1, temperature=5.0, top_k=3, seed=0)[:, -1].tolist())
    assert drawn == best  # 64 draws that flat miss one of three with a chance below 1e-8


def test_context_limits():
    model = make_model(block_size=8)
    assert model.generate(tokens(1, 5), 3).shape == (1, 8)
    with pytest.raises(ValueError, match="9 positions do not fit the context of 8"):
        model.generate(tokens(1, 5), 4)
    with pytest.raises(ValueError, match="do not fit"):
        model.generate(tokens(1, 5), 10**15)  # before memory is taken for them
    with pytest.raises(ValueError, match="9 positions do not fit the context of 8"):
        model.logits(tokens(1, 9))
    cache = KVCache(model.config, model.plan, 1, 4)
    with pytest.raises(ValueError, match="5 positions do not fit the context of 4"):
        model(tokens(1, 5), cache=cache)


@pytest.mark.parametrize("filled", [0, 3, 8])
def test_stream_refuses_at_the_call_what_does_not_fit(filled):
    """Whatever is in the cache already, before anything is computed."""
    model = make_model(block_size=16)

    def stream(max_len: int, T: int, n: int):
        cache = KVCache(model.config, model.plan, 1, max_len)
        if filled:
            model(tokens(1, filled), cache=cache)
        return cache, lambda: model.stream(tokens(1, T), n, temperature=0, cache=cache)

    for max_len, T, n, fits in (
        (32, 2, 14 - filled, True),  # of the context of 16
        (32, 2, 15 - filled, False),
        (32, 17 - filled, 0, False),
        (12, 2, 11 - filled, True),  # of the cache of 12: the last new token is not fed back
        (12, 2, 12 - filled, False),
    ):
        if n < 0:
            continue
        cache, call = stream(max_len, T, n)
        if fits:
            assert len(list(call())) == n
        else:
            with pytest.raises(ValueError, match=f"do not fit .* {min(max_len, 16)};"):
                call()
            assert cache.length == filled
    with pytest.raises(ValueError, match="a prompt needs 1 token"):
        stream(32, 0, 2)[1]()


def test_a_cache_belongs_to_its_plan():
    model = make_model()
    cache = KVCache(model.config, model.resolve("keep:0"), 1, 8)
    model(tokens(1, 3), cache=cache)
    for options in ({"plan": "full"}, {"targets": tokens(1, 3)}):
        with pytest.raises(ValueError, match="generation under plan 'keep:0'"):
            model(tokens(1, 3), cache=cache, **options)
    assert cache.length == 3


def test_a_context_of_one_token():
    model = make_model("fusedkv", block_size=2)
    assert model.generate(tokens(1, 1), 1, temperature=0).shape == (1, 2)
    idx = tokens(1, 1)
    assert torch.isfinite(GPT(GPTConfig(block_size=1, vocab_size=61))(idx, idx)[1])


def test_bfloat16_weights_keep_exact_angles():
    model = make_model("fusedkv", block_size=4096)
    idx, positions = tokens(1, 8), torch.arange(4096)
    expected = model.logits(idx)
    exact = model.rope(positions)
    for rope in (model.bfloat16().rope(positions), make_model(block_size=4096).bfloat16().rope(positions)):
        assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(rope, exact))
    error = (model.logits(idx).float() - expected).norm() / expected.norm()
    assert error < 0.05
    assert model.generate(idx, 4, temperature=0).shape == (1, 12)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["full", "fusedkv", "sandwich-top:2"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_model_built_on_the_meta_device_becomes_a_real_one(spec, tie_embeddings):
    """As frameworks do that allocate a model where its weights will be, and load them then."""
    model = make_model(spec, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        empty = GPT(model.config)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    idx = tokens(2, 9)
    torch.testing.assert_close(empty.logits(idx), model.logits(idx), rtol=0, atol=0)
    assert torch.equal(empty.generate(idx, 9, temperature=0), model.generate(idx, 9, temperature=0))


def test_bad_sizes():
    for sizes, part in (
        ({"n_embd": 30}, "n_embd 30 is not a multiple of n_head 4"),
        ({"n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"n_layer": 0}, "n_layer 0"),
    ):
        with pytest.raises(PlanError, match=part):
            GPTConfig(**sizes)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_pieces_serve_every_plan():
    """Compiled equals uncompiled, and after the first plans new ones compile nothing."""
    model = make_model(n_layer=6)
    idx = tokens(2, 16)
    router = StochasticRouter(6, 0.5)
    expected = [model(idx, idx, plan=router.plan(s))[1].item() for s in range(200)]
    kernels.compile_training(model)
    for s in range(4):
        model(idx, idx, plan=router.plan(s))[1].backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for s in range(200):
        loss = model(idx, idx, plan=router.plan(s))[1]
        loss.backward()
        assert loss.item() == pytest.approx(expected[s], abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


@torch.no_grad()
@pytest.mark.parametrize("spec", ["full", "fusedkv", "sandwich-middle:2", "shared-v"])
def test_steps_of_fixed_sizes_decode_the_same(spec):
    """As a CUDA graph has them: all blocks of the cache are read, and those not filled yet masked."""
    model = make_model(spec, block_size=400)
    idx = tokens(2, 120)
    expected = model.generate(idx, 20, temperature=0)
    cache = KVCache(model.config, model.plan, 2, 400)
    cache.fixed = True
    for _ in range(20):
        idx_next = model(idx if cache.length == 0 else idx[:, -1:], cache=cache)[0][:, -1].argmax(-1)
        idx = torch.cat((idx, idx_next[:, None]), dim=1)
    assert torch.equal(idx, expected)
