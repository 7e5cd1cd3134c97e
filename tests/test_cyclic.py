"""Plans in which a layer reads one above it: the nine configurations of arXiv 2410.14442 and others."""

import kernels
from kv_router import Plan, PlanError
from model import GPTConfig, KVCache
from support.costs import costs

import pytest
import torch
from conftest import SAID, make_model
from test_model import CLOSE, cached_logits, reference_logits, tokens

NINE = [f"{a}-{b}" for a in ("pizza", "sandwich", "lasagna") for b in ("bottom", "middle", "top")]
SIZES = [(3, 1), (4, 2), (6, 3), (7, 4), (5, 5)]  # layers, KV layers
OTHERS = [
    "1_0",
    "3_1_0_3",
    "0_2_4_3_4",
    "2_1_2_4_4_5",
    "k2v1_1_2_3",
    "0_k0+2v1+3_2_3",
    "4_0_1_2_3",
    "k1+3v2_0_3_k0v2_1",
]
CASES = [(n, f"{name}:{n_kv}") for n, n_kv in SIZES for name in NINE]
CASES += [(len(spec.split("_")), spec) for spec in OTHERS]


@pytest.mark.parametrize(
    "spec, n_layer, segments",
    [
        ("full", 3, ((0, 0), (1, 1), (2, 2))),
        ("sandwich-top:3", 8, ((0, 0), (1, 6), (7, 7))),
        ("pizza-middle:3", 6, ((0, 0), (1, 1), (2, 3), (4, 4), (5, 5))),
        ("lasagna-top:2", 6, ((0, 2), (3, 5))),
        ("0_2_4_3_4", 5, ((0, 0), (1, 4))),  # 1 reads 2, which reads 4: one group
        ("2_3_2_3", 4, ((0, 3),)),  # overlapping
        ("1_1_3_3", 4, ((0, 1), (2, 3))),  # side by side
        ("0_k0v3_2_3", 4, ((0, 0), (1, 3))),
    ],
)
def test_groups_that_iterate(spec, n_layer, segments):
    assert Plan.parse(spec, n_layer).segments == segments


@torch.no_grad()
@pytest.mark.parametrize("n_layer, spec", CASES)
def test_as_many_passes_as_positions_equal_token_by_token_evaluation(n_layer, spec):
    model = make_model(spec, n_layer=n_layer, qk_norm=n_layer == 6)
    idx = tokens(1, 8)
    exact = reference_logits(model, idx[0].tolist(), model.plan)
    torch.testing.assert_close(model.logits(idx)[0], exact, **CLOSE)
    torch.testing.assert_close(model.logits(idx, passes=8)[0], exact, **CLOSE)
    for passes in range(1, 8):  # after n passes the first n positions are exact
        torch.testing.assert_close(model.logits(idx, passes=passes)[0, :passes], exact[:passes], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(4, 4, 8), (4, 1, 8), (6, 2, 4)])
def test_other_head_counts_and_batches(n_head, n_kv_head, head_dim):
    for spec in ("sandwich-top:3", "lasagna-middle:2", "0_k0+2v1+3_2_3_3"):
        model = make_model(spec, n_layer=5, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
        idx = tokens(3, 7)
        expected = torch.stack([reference_logits(model, row.tolist(), model.plan) for row in idx])
        torch.testing.assert_close(model.logits(idx), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("n_layer, spec", CASES)
def test_decode_after_prefill_continues_the_sequential_result(n_layer, spec):
    model = make_model(spec, n_layer=n_layer, forward_passes=30)
    idx = tokens(2, 8)
    expected = model.logits(idx)
    for splits in [(s,) for s in (1, 2, 5, 8)] + [(1, 4), (3, 5, 8)]:
        got, positions = cached_logits(model, idx, model.plan, splits)
        torch.testing.assert_close(got, expected[:, positions], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("n_layer, spec", CASES)
def test_a_later_token_changes_no_earlier_logit(n_layer, spec):
    model = make_model(spec, n_layer=n_layer)
    idx = tokens(1, 10)
    for passes in (1, 3, None):
        before = model.logits(idx, passes=passes)
        for t in (1, 5, 9):
            changed = idx.clone()
            changed[:, t] = (changed[:, t] + 1) % 61
            after = model.logits(changed, passes=passes)
            torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-5)
            assert not torch.allclose(before[:, t], after[:, t], atol=1e-3)


@torch.no_grad()
def test_passes_converge_to_the_exact_result():
    """Over 24 positions; the error by pass count is printed at the end."""
    for name in NINE:
        model = make_model(f"{name}:3", n_layer=6)
        idx = tokens(1, 24)
        exact = model.logits(idx)
        errors = [float((model.logits(idx, passes=n) - exact).abs().max()) for n in (1, 2, 4, 8, 16, 24)]
        text = " ".join(f"{e:.0e}" for e in errors)
        SAID.append(f"{name:16} largest logit error after 1, 2, 4, 8, 16, 24 passes: {text}")
        assert errors[-1] < 1e-4 and (errors[0] > 1e-2) == model.plan.cyclic
        if model.plan.cyclic:
            assert errors[3] < errors[0]


def test_the_first_position_attends_to_nothing():
    q, k, v = (torch.randn(2, n, 5, 8, requires_grad=True) for n in (4, 2, 2))
    y = kernels.attention(q, [k], [v], past_only=True)
    assert torch.equal(y[:, :, 0], torch.zeros(2, 4, 8))
    for t in range(1, 5):
        groups = [x[:, :, :t].repeat_interleave(2, dim=1) for x in (k, v)]
        weights = torch.softmax(q[:, :, t : t + 1] @ groups[0].transpose(-1, -2) / 8**0.5, dim=-1)
        torch.testing.assert_close(y[:, :, t : t + 1], weights @ groups[1])
    y.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
    assert torch.equal(q.grad[:, :, 0], torch.zeros(2, 4, 8)) and torch.equal(
        v.grad[:, :, -1], torch.zeros(2, 2, 8)
    )


@pytest.mark.parametrize("spec", ["sandwich-top:2", "lasagna-middle:1", "0_k0+2v1+2_2"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_match_finite_differences(spec, passes):
    """In float64 and with m = 0, the loss after b passes is a plain function of the weights."""
    model = make_model(
        spec, n_layer=3, n_embd=8, n_head=2, n_kv_head=1, forward_passes=0, backward_passes=passes
    ).double()
    idx, targets = tokens(1, 6), tokens(1, 6, seed=2)

    def loss() -> torch.Tensor:
        logits = model.logits(idx, passes=passes)
        return torch.nn.functional.cross_entropy(logits[0], targets[0])

    torch.testing.assert_close(model(idx, targets)[1].double(), loss(), rtol=1e-5, atol=1e-5)
    loss().backward()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
            slope = 0.0 if p.grad is None else float((p.grad * direction).sum())
            values = []
            for step in (1e-5, -1e-5):
                p.add_(direction, alpha=step)
                values.append(float(loss()))
                p.sub_(direction, alpha=step)
            assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_passes_without_gradient_are_constants():
    """The same value as with gradients in all passes, and another gradient."""
    idx = tokens(1, 16)
    grads, losses = [], []
    for m, b in ((4, 2), (0, 6)):
        model = make_model("sandwich-top:2", forward_passes=m, backward_passes=b)
        loss = model(idx, idx)[1]
        loss.backward()
        losses.append(loss.item())
        grads.append(model.blocks[1].attn.q_proj.weight.grad)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3)


@torch.no_grad()
def test_a_prompt_fed_token_by_token_is_exact_whatever_the_passes():
    idx = tokens(1, 20)
    model = make_model("sandwich-top:2", forward_passes=0, backward_passes=1)
    exact = reference_logits(model, torch.cat((idx, idx[:, :1]), dim=1)[0].tolist(), model.plan)
    for exact_prefill in (False, True):
        cache = KVCache(model.config, model.plan, 1, 21)
        (column,) = model.stream(idx, 1, temperature=0, exact_prefill=exact_prefill, cache=cache)
        last = model(idx[:, :1], cache=cache)[0][0, 0]
        assert torch.allclose(last, exact[-1], **CLOSE) == exact_prefill
        if exact_prefill:
            assert column.item() == exact[19].argmax()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["sandwich-top:2", "lasagna-middle:1", "3_1_0_3"])
def test_a_prompt_no_longer_than_the_passes_is_exact(spec):
    """T passes over T positions are exact, whether or not the last one still changed anything."""
    for forward_passes, backward_passes in ((0, 1), (2, 1), (7, 2)):
        model = make_model(spec, forward_passes=forward_passes, backward_passes=backward_passes)
        for T in range(1, forward_passes + backward_passes + 1):
            idx = tokens(2, T)
            cache = KVCache(model.config, model.plan, 2, T)
            got = model(idx, cache=cache)[0][:, 0]
            expected = [reference_logits(model, row.tolist(), model.plan)[-1] for row in idx]
            torch.testing.assert_close(got, torch.stack(expected), **CLOSE)


def test_training_updates_every_parameter():
    for n_layer, spec in CASES:
        model = make_model(spec, n_layer=n_layer)
        idx = tokens(2, 12)
        model(idx, idx)[1].backward()
        dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not dead, (spec, dead)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["3_1_2_1_4_5", "0_1_5_3_3_2", "1_0_3_2_5_4", "5_4_2_0_4_1", "2_2_2_5_5_5"])
def test_a_full_model_runs_under_cyclic_plans(spec):
    model, plan = make_model(n_layer=6), Plan.parse(spec, 6)
    idx = tokens(1, 7)
    expected = reference_logits(model, idx[0].tolist(), plan)
    torch.testing.assert_close(model.logits(idx, plan)[0], expected, **CLOSE)


def test_costs_multiply_by_the_passes():
    shape = GPTConfig(n_layer=6, forward_passes=3, backward_passes=2)
    once = GPTConfig(n_layer=6, forward_passes=0, backward_passes=1)
    for spec in ("pizza-top:3", "lasagna-top:2", "sandwich-top:2"):
        plan = Plan.parse(spec, 6)
        a, b = costs(plan, shape, context=64), costs(plan, once, context=64)
        assert a.decode_bytes == b.decode_bytes and a.params == b.params
        assert 1.3 < a.prefill_flops / b.prefill_flops < 5 and 1.3 < a.train_flops / b.train_flops < 3
    top = Plan.parse("lasagna-top:1", 2)  # layer 0 and layer 1's KV run every pass, the rest of layer 1 once
    sizes = {"vocab_size": 1, "n_layer": 2, "n_head": 1, "n_kv_head": 1, "n_embd": 2, "n_hidden": 1}
    s = GPTConfig(**sizes, forward_passes=3, backward_passes=2)
    kv, rest, attend = 2 * 2 * 2 * 2, 2 * (2 * 2 * 2 + 3 * 2), 4 * 2 * 55
    assert (
        costs(top, s, context=10).train_flops
        == (3 + 6) * (10 * (kv + rest) + attend) + 3 * (10 * rest + attend) + 120
    )
    assert costs(top, s, context=10).prefill_flops == 5 * (10 * (kv + rest) + attend) + rest + 10 * 8 + 4


def test_mistakes():
    with pytest.raises(PlanError, match="number of KV layers '0'"):
        Plan.parse("sandwich-top:0", 6)
    with pytest.raises(PlanError, match="number of KV layers '7'"):
        Plan.parse("pizza-middle:7", 6)
    with pytest.raises(PlanError, match=r"layer 0 reads K of layer 3; it has K of layers \(0, 1\)"):
        make_model("pizza-bottom:2").logits(tokens(1, 4), "3_1_1_1")
