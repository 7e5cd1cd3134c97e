"""Checkpoint folders against transformers itself, on random tiny models made on the spot."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model
from test_model import tokens

from cli import UserError
from hf import load_hf, save_hf
from kv_router import PlanError
from model import KVCache, convert

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    "llama": ("Llama", {}),
    "llama-tied-mqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": (
        "Llama",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def theirs(case: str, folder=None):
    name, options = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES | options)
    )
    with torch.no_grad():  # norms and biases too must matter
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    if folder:
        model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_both_ways(case, tmp_path):
    reference = theirs(case, tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    idx = tokens(2, 40)
    expected = reference(idx).logits
    torch.testing.assert_close(model.logits(idx), expected, rtol=1e-4, atol=1e-4)
    greedy = reference.generate(
        idx[:1, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(idx[:1, :5], 20, temperature=0), greedy)
    save_hf(model, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(back(idx).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_hf(tmp_path / "ours").logits(idx), model.logits(idx), rtol=0, atol=0)


@torch.no_grad()
def test_shards_and_stored_types(tmp_path):
    reference = theirs("llama")
    for p in reference.parameters():
        p.copy_(p.bfloat16().float())
    copy.deepcopy(reference).bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = load_hf(tmp_path)
    assert model.embed.weight.dtype == torch.float32
    idx = tokens(1, 10)
    torch.testing.assert_close(model.logits(idx), reference(idx).logits, rtol=1e-4, atol=1e-4)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="shard .*00002.* is missing"):
        load_hf(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", ["full", "cla:2", "fusedkv", "fusedkv-lite", "sandwich-top:3", "0_k0+1v1_k0v0+1_3"]
)
def test_plans_and_gates_come_back(plan, tmp_path):
    model = make_model(plan)
    save_hf(model, tmp_path)
    back = load_hf(tmp_path)
    assert back.plan == model.plan
    torch.testing.assert_close(back.logits(tokens(1, 9)), model.logits(tokens(1, 9)), rtol=0, atol=0)
    save_hf(make_model("full"), tmp_path)  # nothing of the old plan may stay behind
    assert load_hf(tmp_path).plan.spec == "full"


@torch.no_grad()
def test_a_sliding_window_matters_only_beyond_it(tmp_path):
    CASES["windowed"] = ("Mistral", {"sliding_window": 16})
    reference = theirs("windowed", tmp_path)
    del CASES["windowed"]
    with pytest.raises(UserError, match="sliding window of 16 tokens"):
        load_hf(tmp_path)
    model = load_hf(tmp_path, block_size=16)
    idx = tokens(1, 16)
    torch.testing.assert_close(model.logits(idx), reference(idx).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; valid are llama, mistral, qwen2, qwen3"),
        ({"model_type": "smollm3"}, "model_type 'smollm3'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"something_new": 3}, "something_new = 3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3"),
        ({"num_hidden_layers": 2}, "a tensor model.layers.2"),
        ({"intermediate_size": 64}, "down_proj.weight is (32, 48) and its config.json asks for (32, 64)"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(change, part, tmp_path):
    theirs("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as e:
        load_hf(tmp_path)
    assert part in str(e.value) and "\n" not in str(e.value)


def test_bad_files_are_refused(tmp_path):
    good = tmp_path / "good"
    theirs("llama", good)
    raw = (good / "model.safetensors").read_bytes()

    def refused(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(UserError) as e:
            load_hf(folder)
        assert "\n" not in str(e.value)
        return str(e.value)

    weights = "model.safetensors"
    assert "damaged" in refused("cut", lambda f: (f / weights).write_bytes(raw[:-100]))
    assert "damaged" in refused("lies", lambda f: (f / weights).write_bytes(b"\xff" * 7 + b"\x00" + raw[8:]))
    assert "damaged" in refused("empty", lambda f: (f / weights).write_bytes(b""))
    assert "no model.safetensors" in refused("none", lambda f: (f / weights).unlink())
    assert "can run code" in refused("pickle", lambda f: (f / weights).rename(f / "pytorch_model.bin"))
    assert "is not JSON" in refused("json", lambda f: (f / "config.json").write_text("{"))
    assert "cannot read" in refused("bare", lambda f: (f / "config.json").unlink())
    escape = json.dumps({"weight_map": {"a": "../good/model.safetensors"}})
    assert "outside the folder" in refused("out", lambda f: (f / f"{weights}.index.json").write_text(escape))

    def drop(folder):
        tensors = load_file(folder / weights)
        del tensors["model.norm.weight"]
        save_file(tensors, folder / weights)

    assert "no tensor model.norm.weight" in refused("gap", drop)


@torch.no_grad()
def test_conversion_fits_the_gates_by_least_squares():
    """The fit of every head and feature equals numpy's, and no other gates come closer."""
    model = make_model(n_layer=4, block_size=64)
    batches = [tokens(2, 40, seed=s) for s in range(3)]
    new = convert(model, "fusedkv", batches)
    assert new.plan.spec == "fusedkv" and new.blocks[3].attn.k_proj is None
    K, V = {}, {}
    for idx in batches:
        cache = KVCache(model.config, model.plan, 2, 40)
        model(idx, cache=cache)
        for i in range(4):
            for store, t in zip((K, V), cache.read(i, 40)):
                store[i] = torch.cat((store[i], t)) if i in store else t
    for i in (2, 3):
        for head in range(2):
            for j in range(8):
                columns = [V[s][:, head, :, j].flatten().numpy() for s in (0, 1)]
                best = np.linalg.lstsq(
                    np.stack(columns, 1), V[i][:, head, :, j].flatten().numpy(), rcond=None
                )[0]
                assert new.blocks[i].attn.v_gate[:, head, 0, j].numpy() == pytest.approx(best, abs=1e-3)
            for j in range(4):  # a key gate serves features j and j + 4
                columns = [K[s][:, head][..., [j, j + 4]].flatten().numpy() for s in (0, 1)]
                target = K[i][:, head][..., [j, j + 4]].flatten().numpy()
                best = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)[0]
                assert new.blocks[i].attn.k_gate[:, head, 0, j].numpy() == pytest.approx(best, abs=1e-3)


@torch.no_grad()
def test_conversion_keeps_what_a_plan_keeps():
    model = make_model()
    idx = tokens(1, 12)
    for plan in ("full", "cla:2", "fusedkv-lite", "sandwich-top:3"):
        new = convert(model, plan)
        torch.testing.assert_close(new.logits(idx), model.logits(idx, plan), rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match="layer 2 reads K of layer 2"):
        convert(make_model("fusedkv"), "full")
    whole = make_model()
    for block in whole.blocks[2:]:
        for proj in (block.attn.k_proj, block.attn.v_proj):
            torch.nn.init.zeros_(proj.weight)
    gates = [p for n, p in convert(whole, "fusedkv", [idx]).named_parameters() if n.endswith("_gate")]
    assert max(g.abs().max() for g in gates) < 1e-4  # zero is the best fit of zero
