"""Checkpoint folders against transformers itself, on random tiny models made on the spot."""

import copy
import json
import os
import shutil
from pathlib import Path

from kv_router import PlanError
from model import GPTConfig
from support.cli import UserError
from support.convert import convert
from support.hf import load_hf, read_config, save_hf

import pytest
import torch
from conftest import make_model
from test_model import tokens

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
    "llama-head-64": ("Llama", {"head_dim": 64, "num_attention_heads": 2, "hidden_size": 128}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def theirs(case: str, folder=None, **more):
    """A random model of transformers, written to `folder` where one is given."""
    name, options = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | options | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # norms and biases too must matter
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.3) + (p.dim() == 1))
    if folder:
        model.save_pretrained(folder)
    return model.eval()


def edit(folder: Path, change: dict, drop=(), name: str = "config.json") -> None:
    """Change keys of a folder's config.json."""
    config = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def check_parity(folder: Path, idx=None):
    """Load a folder here and with transformers, compare the logits in float32, and return our model."""
    idx = tokens(2, 40) if idx is None else idx
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_hf(folder)
    torch.testing.assert_close(model.logits(idx), reference(idx).logits, rtol=1e-4, atol=1e-4)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_both_ways(case, tmp_path, capsys):
    reference = theirs(case, tmp_path / "theirs")
    capsys.readouterr()
    model = load_hf(tmp_path / "theirs")
    assert capsys.readouterr().out == ""  # nothing that transformers writes is passed over
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
    with pytest.raises(UserError, match="has no tensor .*; a shard may be missing"):
        load_hf(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", ["full", "cla:2", "fusedkv", "fusedkv-lite", "sandwich-top:3", "0_k0+1v1_k0v0+1_3"]
)
def test_plans_and_gates_come_back(plan, tmp_path):
    model = make_model(plan)
    folder = tmp_path / "new"
    save_hf(model, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["nanokv"]["plan"] == model.plan.spec
    back = load_hf(folder)
    assert back.plan == model.plan
    torch.testing.assert_close(back.logits(tokens(1, 9)), model.logits(tokens(1, 9)), rtol=0, atol=0)
    with pytest.raises(UserError, match="is there and holds other things"):
        save_hf(make_model("full"), folder)
    assert load_hf(folder).plan == model.plan and os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("value", [False, True])
def test_folders_of_earlier_versions(value, tmp_path):
    """They may say key_residual, which is refused where it is true."""
    save_hf(make_model("shared-v"), tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["nanokv"]
    edit(tmp_path, {"nanokv": own | {"key_residual": value}})
    if not value:
        assert load_hf(tmp_path).plan.spec == "shared-v"
        return
    with pytest.raises(UserError, match="has key_residual, which this version does not have"):
        load_hf(tmp_path)


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
    "own, part",
    [
        (3, "holds no settings"),
        ({"plan": "cla:9"}, "plan 'cla:9' for 4 layers"),
        ({"plan": 3}, "plan = 3 is not a text"),
        ({"plam": "full"}, "unknown key 'plam'; did you mean plan?"),
        ({"vocab_size": 3}, "'vocab_size' under nanokv is not known; valid are backward_passes"),
        ({"backward_passes": 0}, "backward_passes 0 is not valid"),
        ({"plan": "full"}, "no tensor model.layers.1.self_attn.k_proj.weight"),
        ({"plan": "0_0_2_k0+2v0+2"}, "no tensor model.layers.3.self_attn.k_gate"),
    ],
)
def test_damaged_plans_are_refused(own, part, tmp_path):
    save_hf(make_model("cla:2"), tmp_path)
    edit(tmp_path, {"nanokv": own})
    with pytest.raises(UserError) as e:
        load_hf(tmp_path)
    assert part in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; valid are llama, mistral, qwen2, qwen3"),
        ({"model_type": "smollm3"}, "model_type 'smollm3'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling of type 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "a partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "llama3 rope with high_freq_factor = None",
        ),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3"),
        ({"num_hidden_layers": 2}, "a tensor model.layers.2"),
        ({"intermediate_size": 64}, "down_proj.weight is (32, 48) and its config.json asks for (32, 64)"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(change, part, tmp_path):
    theirs("llama", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError) as e:
        load_hf(tmp_path)
    assert part in str(e.value) and "\n" not in str(e.value)


OLD_ROPE = ("rope_parameters", "dtype")  # keys that only new versions of transformers write


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_rope_scaling_in_its_old_spelling_is_refused_by_name(case, kind, spelling, tmp_path):
    theirs(case, tmp_path)
    edit(tmp_path, {"rope_theta": 10000.0, "rope_scaling": {spelling: kind, "factor": 2.0}}, drop=OLD_ROPE)
    with pytest.raises(UserError, match=f"rope scaling of type '{kind}'"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "case, change, part",
    [
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mistral", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16 tokens"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16 tokens"),
        (
            "qwen3",
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 16},
            "sliding window of 16 tokens",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 16},
            "sliding window of 16 tokens",
        ),
        ("mistral", {"sliding_window": "16"}, "a sliding window of '16' tokens"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layers of type 'linear_attention'"),
        ("qwen2", {"layer_types": ["full_attention", None, "full_attention"]}, "layers of type 'None'"),
        ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layers of type 'chunked_attention'"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name_in_other_families(case, change, part, tmp_path):
    theirs(case, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError) as e:
        load_hf(tmp_path)
    assert part in str(e.value) and "\n" not in str(e.value)


def test_mistral_without_a_word_on_its_window_has_one_of_4096(tmp_path):
    """That is the default in transformers; null means none."""
    theirs("mistral", tmp_path, max_position_embeddings=8192)
    assert read_config(tmp_path).block_size == 8192
    edit(tmp_path, {}, drop=["sliding_window"])
    with pytest.raises(UserError, match="sliding window of 4096 tokens"):
        read_config(tmp_path)
    assert read_config(tmp_path, block_size=4096).block_size == 4096


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change, drop",
    [
        ({"is_causal": False}, ()),
        (  # transformers prefers the old spelling where a config has both
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
            (),
        ),
        ({"original_max_position_embeddings": 32, "rope_parameters": LLAMA3}, ()),
        ({"rope_theta": 5e5}, ("rope_parameters",)),
        ({"rope_theta": 5e5}, ()),  # beside rope_parameters it is not read
        ({}, ("rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters", "pad_token_id")),
        ({"pretraining_tp": None}, ()),
        ({"pad_token_id": 3, "attention_dropout": 0.5, "initializer_range": 0.9}, ()),
        ({"output_attentions": True, "output_hidden_states": True, "use_cache": False}, ()),
        ({"max_window_layers": 1, "use_sliding_window": False}, ()),
    ],
    ids=lambda value: "-".join(value) or None,
)
def test_what_transformers_reads_is_read_or_refused(case, change, drop, tmp_path):
    """A folder gives the logits that it gives in transformers, or a refusal; never other logits."""
    theirs(case, tmp_path, tie_word_embeddings=False)
    edit(tmp_path, change, drop)
    try:
        load_hf(tmp_path)
    except UserError:
        return
    check_parity(tmp_path)


# --- folders as people have them --------------------------------------------------------------------------


LLAMA32_ROPE = {  # of Llama 3.2, with a context as small as this model's
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16, "rope_type": "llama3",
}  # fmt: skip
GENERATION = {"max_length": 2048, "top_k": 50, "top_p": 0.9, "temperature": 0.6, "do_sample": True}


@torch.no_grad()
@pytest.mark.parametrize(
    "case, change, drop, passed_over",
    [
        (
            "llama-tied-mqa",
            {
                "is_llama_config": True,
                "rope_interleaved": False,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            },
            (),
            "is_llama_config, transformers.js_config",
        ),
        (
            "llama-head-64",
            {"_attn_implementation_autoset": True, "_name_or_path": "x", "mlp_bias": False, "head_dim": 64},
            (),
            "_attn_implementation_autoset",
        ),
        (
            "llama-tied-mqa",
            {"unsloth_fixed": True, "rope_theta": 5e5, "rope_scaling": LLAMA32_ROPE},
            OLD_ROPE,
            "unsloth_fixed",
        ),
        ("mistral", {"neftune_noise_alpha": 5.0}, (), "neftune_noise_alpha"),
        ("qwen2", {"neftune_noise_alpha": 5.0}, (), "neftune_noise_alpha"),
        ("qwen3", GENERATION, (), "do_sample, max_length, temperature, top_k, top_p"),
        ("llama", GENERATION, (), "do_sample, max_length, temperature, top_k, top_p"),
        ("llama", {"something_new": 3}, (), "something_new"),
        ("llama", {"something_new": {"rope_theta": 1e6}, "also": [1]}, (), "also, something_new"),
        ("qwen2", {"something_off": False, "nothing": None, "empty": {}}, (), ""),
    ],
)
def test_keys_that_change_nothing_are_passed_over_and_named(
    case, change, drop, passed_over, tmp_path, capsys
):
    theirs(case, tmp_path)
    edit(tmp_path, change, drop)
    capsys.readouterr()
    load_hf(tmp_path)
    expected = f"{tmp_path / 'config.json'}: passed over {passed_over}\n" if passed_over else ""
    assert capsys.readouterr().out == expected
    check_parity(tmp_path)


def test_the_config_of_smollm2(tmp_path):
    """config.json of SmolLM2-135M, word for word."""
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = GPTConfig(
        vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64, n_hidden=1536,
        block_size=8192, rope_theta=100000.0, norm_eps=1e-5, tie_embeddings=True, stop_tokens=[0],
    )  # fmt: skip
    assert read_config(tmp_path) == expected
    assert read_config(tmp_path, block_size=1024).block_size == 1024
    assert read_config(tmp_path, block_size=1 << 20).block_size == 8192


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "change, drop",
    [
        ({"torch_dtype": "float32", "rope_theta": 5e5, "rope_scaling": None}, OLD_ROPE),
        (
            {"torch_dtype": "bfloat16", "rope_theta": 500000, "rope_scaling": LLAMA32_ROPE},
            (*OLD_ROPE, "layer_types"),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA32_ROPE, "type": "llama3"}},
            (*OLD_ROPE, "layer_types"),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {key.replace("rope_type", "type"): x for key, x in LLAMA32_ROPE.items()},
            },
            OLD_ROPE,
        ),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, OLD_ROPE),
        (
            {
                "dtype": "bfloat16",
                "rope_parameters": LLAMA32_ROPE | {"rope_theta": 5e5},
                "layer_types": ["full_attention"] * 3,
            },
            (),
        ),
    ],
    ids=["old", "old-llama3", "old-both", "old-type", "old-default", "new"],
)
def test_old_and_new_spellings(case, sharded, change, drop, tmp_path, capsys):
    if case == "mistral":  # transformers reads its layer_types only together with a window
        change = {key: value for key, value in change.items() if key != "layer_types"}
    reference = theirs(case)
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    edit(tmp_path, change, drop)
    capsys.readouterr()
    model = check_parity(tmp_path)
    assert "passed over" not in capsys.readouterr().out
    assert model.config.rope_theta == (10000.0 if "type" in change.get("rope_parameters", ()) else 5e5)
    idx = tokens(2, 40)
    assert not torch.allclose(model.logits(idx), reference(idx).logits, atol=1e-2)  # these keys do matter


@torch.no_grad()
def test_tied_weights_stored_twice(tmp_path):
    theirs("llama-tied-mqa", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = check_parity(tmp_path)
    assert model.lm_head.weight is model.embed.weight


@torch.no_grad()
def test_tied_weights_that_differ_are_refused_or_kept_apart(tmp_path):
    """Where a config ties them and the file has two different ones, transformers uses both."""
    theirs("llama", tmp_path)
    edit(tmp_path, {"tie_word_embeddings": True})
    try:
        load_hf(tmp_path)
    except UserError as e:
        assert "lm_head.weight" in str(e) and "tie_word_embeddings" in str(e)
        return
    check_parity(tmp_path)


def test_untied_weights_without_an_output_layer_are_refused(tmp_path):
    theirs("llama-tied-mqa", tmp_path)
    for change, drop in (({"tie_word_embeddings": False}, ()), ({}, ["tie_word_embeddings"])):
        edit(tmp_path, change, drop)
        with pytest.raises(UserError, match="no tensor lm_head.weight.* tie_word_embeddings is false") as e:
            load_hf(tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (2, None, [2]),
        (0, None, [0]),
        ([5, 2], None, [2, 5]),
        (None, None, []),
        (None, {"eos_token_id": 7}, [7]),
        (2, {"eos_token_id": [7, 2]}, [2, 7]),
        ([2, 3], {"eos_token_id": None}, [2, 3]),
        (2, {"temperature": 0.6}, [2]),
    ],
)
def test_tokens_that_end_a_text(config, generation, expected, tmp_path):
    theirs("llama", tmp_path / "theirs")
    edit(tmp_path / "theirs", {"eos_token_id": config})
    (tmp_path / "theirs" / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(generation))
    model = load_hf(tmp_path / "theirs")
    assert model.config.stop_tokens == expected
    save_hf(model, tmp_path / "ours")
    assert load_hf(tmp_path / "ours").config.stop_tokens == expected


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
    assert "has no model*.safetensors" in refused("none", lambda f: (f / weights).unlink())
    assert "can run code" in refused("pickle", lambda f: (f / weights).rename(f / "pytorch_model.bin"))
    assert "is not JSON" in refused("json", lambda f: (f / "config.json").write_text("{"))
    assert "cannot read" in refused("bare", lambda f: (f / "config.json").unlink())

    def drop(folder):
        tensors = load_file(folder / weights)
        del tensors["model.norm.weight"]
        save_file(tensors, folder / weights)

    assert "no tensor model.norm.weight" in refused("gap", drop)


@torch.no_grad()
def test_conversion_keeps_what_a_plan_keeps():
    model = make_model()
    idx = tokens(1, 12)
    for plan in ("full", "cla:2", "fusedkv-lite", "sandwich-top:3"):
        new = convert(model, plan)
        torch.testing.assert_close(new.logits(idx), model.logits(idx, plan), rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match="layer 2 reads K of layer 2"):
        convert(make_model("fusedkv"), "full")
    fused = convert(model, "fusedkv")  # whose gates start like FusedKV-Lite
    torch.testing.assert_close(fused.logits(idx), model.logits(idx, "fusedkv-lite"), rtol=1e-5, atol=1e-5)
