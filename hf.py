"""Hugging Face checkpoint folders in and out: Llama (SmolLM too), Mistral, Qwen2 and Qwen3.

    python hf.py RUN FOLDER                      # write a training run as such a folder
    model = load_hf("path/to/SmolLM2-135M")      # config.json and model*.safetensors
    save_hf(model, "path/to/mine")               # a folder that transformers opens

Needs the package safetensors. What a config asks for and this model does not have is refused by name. The
plan lives in nanokv.json, with checksums of the other files, and its gates in nanokv.safetensors.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch

from cli import Parser, UserError, checked, read_json, replace_file, run, sealed, sha256
from kv_router import PlanError, check_size
from model import GPT, GPTConfig

# Config keys that change nothing in a forward pass of these families.
IGNORED = {
    *(
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "model_type",
        "use_cache",
        "return_dict",
    ),
    *(
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "id2label",
        "label2id",
        "_name_or_path",
    ),
    *("max_window_layers", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"),
}
# HF's name of a setting -> ours.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "n_hidden",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
FETCH = "fetch the checkpoint folder again"
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def hf_name(name: str) -> str:
    """blocks.3.attn.q_proj.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name == "lm_head.weight":
        return name
    for ours, theirs in (
        ("embed.", "embed_tokens."),
        ("blocks.", "layers."),
        (".norm1.", ".input_layernorm."),
        (".norm2.", ".post_attention_layernorm."),
        (".attn.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return "model." + name


def read_config(folder: str | Path, block_size: int | None = None) -> GPTConfig:
    """The model that a folder's config.json asks for, with a context of `block_size`, by default its own."""
    path = Path(folder) / "config.json"
    hf = read_json(path, FETCH)
    family = hf.get("model_type")
    if str(family) not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not known; valid are {', '.join(FAMILIES)}")
    sizes = {ours: hf[theirs] for theirs, ours in SIZES.items() if hf.get(theirs) is not None}
    sizes = checked(sizes, GPTConfig, path)
    if missing := {"vocab_size", "n_embd", "n_layer", "n_head"} - set(sizes):
        names = [theirs for theirs, ours in SIZES.items() if ours in missing]
        raise UserError(f"{path} lacks {', '.join(names)}")
    sizes = {"tie_embeddings": False, "n_kv_head": 0, "norm_eps": 1e-6} | sizes
    sizes["block_size"] = min(block_size or sizes.get("block_size", 2048), sizes.get("block_size", 2048))

    def refuse(what: object):
        raise UserError(f"{path} asks for {what}, which this model does not have")

    if hf.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {hf['hidden_act']!r}")
    if hf.get("pretraining_tp", 1) != 1:
        refuse(f"pretraining_tp {hf['pretraining_tp']}")
    window = hf.get("sliding_window") if family == "mistral" or hf.get("use_sliding_window") else None
    if window and not isinstance(window, int):
        refuse(f"a sliding window of {window!r} tokens")
    if window and window < sizes["block_size"]:
        refuse(f"a sliding window of {window} tokens (load it with block_size={window} and none is needed)")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse(f"rope scaling {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind == "default":
        rope = {}
    elif kind != "llama3":
        refuse(f"rope scaling of type {kind!r}")
    elif set(rope) != LLAMA3_ROPE:
        refuse(f"llama3 rope scaling with {', '.join(sorted(set(rope) ^ LLAMA3_ROPE))} missing or unknown")
    numbers = {"norm_eps": sizes["norm_eps"], "rope_theta": theta} | rope
    if bad := [n for n, x in numbers.items() if not isinstance(x, int | float) or not 0 < x < math.inf]:
        refuse(f"{bad[0]} = {numbers[bad[0]]!r}")
    if rope and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        refuse("high_freq_factor below low_freq_factor")
    known = IGNORED | set(SIZES) | {"hidden_act", "pretraining_tp", "use_sliding_window"}
    for key, value in hf.items():
        if key not in known and value:  # switched off, or 0.0, is what we have
            refuse(f"{key} = {value!r}")
    own = read_own(Path(folder))
    return GPTConfig(**sizes, **FAMILIES[family], **own, rope_theta=theta, rope_scaling=rope or None)


OWN = ("plan", "forward_passes", "backward_passes")  # settings that config.json has no place for
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def read_own(folder: Path) -> dict:
    """What save_hf wrote into nanokv.json, where there is one, after comparing the checksums in it."""
    path = folder / "nanokv.json"
    if not path.exists():
        return {}
    own = read_json(path, FETCH)
    sums = own.get("sha256", {})
    for name in sums if isinstance(sums, dict) else ():
        if sha256(folder / Path(name).name) != sums[name]:
            raise UserError(f"{folder / name} is damaged or not of {path}; {FETCH}, or delete {path.name}")
    own = {name: value for name, value in own.items() if name not in ("sha256", "checksum")}
    if unknown := set(own) - set(OWN):
        raise UserError(f"{path}: {min(unknown)!r} is not known; valid are {', '.join(OWN)}")
    return checked(own, GPTConfig, path)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors: one file, or the shards that its index names."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError("Hugging Face folders need the package safetensors: pip install safetensors") from e
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index, FETCH).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise UserError(f"{index} has no weight_map of file names; {FETCH}")
        shards = sorted(set(weight_map.values()))
        if any(Path(shard).name != shard for shard in shards):
            raise UserError(f"{index} names a shard outside the folder")
        files = [folder / shard for shard in shards]
    elif single.exists():
        files = [single]
    elif pickled := next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None):
        raise UserError(f"{pickled} holds pickled weights, which can run code; convert them to safetensors")
    else:
        raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    extra = folder / "nanokv.safetensors"
    tensors = {}
    for file in [*files, *([extra] if extra.exists() else [])]:
        try:
            tensors |= load_file(file)
        except FileNotFoundError as e:
            raise UserError(f"the shard {file} is missing; fetch the checkpoint again") from e
        except Exception as e:  # safetensors' own error type, for what is truncated or no safetensors at all
            raise UserError(f"{file} is damaged or no safetensors file ({e}); fetch it again") from e
    return tensors


def load_hf(folder: str | Path, block_size: int | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    """The model in a Hugging Face checkpoint folder, on the CPU.

    Raises UserError (one line) for a missing, truncated or pickled file, a tensor that is missing, of the
    wrong shape or not known, and for what its config asks and this model does not have."""
    folder = Path(folder)
    config = read_config(folder, block_size)
    tensors = read_tensors(folder)
    try:
        check_size(config, config.block_size, sum(t.nbytes for t in tensors.values()))
    except PlanError as e:
        raise UserError(f"{folder}: {e}") from e
    model = GPT(config).to(dtype)
    wanted = {hf_name(name): p for name, p in model.state_dict().items()}
    if model.config.tie_embeddings:  # some folders store the shared matrix once more
        tensors.pop("lm_head.weight", None)
        del wanted["lm_head.weight"]
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    for name in sorted(set(wanted) | set(tensors)):
        if name not in tensors:
            raise UserError(
                f"{folder} has no tensor {name}, which its config.json asks for; a shard may be missing"
            )
        if name not in wanted:
            raise UserError(f"{folder} has a tensor {name}, which this model does not have")
        if wanted[name].shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(wanted[name].shape)
            raise UserError(f"{folder}: tensor {name} is {have} and its config.json asks for {want}")
        wanted[name].copy_(tensors[name])
    return model.eval()


def export(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """What transformers needs to build the same model: its config and its weights, the model's own memory. As
    Qwen3 with QK-norm, as Qwen2 with biases, else as Llama; UserError where none of them fits."""
    c = model.config
    if c.qk_norm and c.qkv_bias:
        raise UserError("no Hugging Face family here has both QK-norm and biases without one on the output")
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    if family == "qwen2" and c.head_dim * c.n_head != c.n_embd:
        raise UserError(f"Qwen2 has head_dim n_embd / n_head, and this model {c.head_dim}")
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    config = {theirs: getattr(c, ours) for theirs, ours in SIZES.items()}
    config |= {
        "architectures": [architecture[family]],
        "model_type": family,
        "hidden_act": "silu",
        "rope_parameters": rope | ({"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else {}),
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }
    return config, {hf_name(name): p.detach() for name, p in model.state_dict().items()}


def save_hf(model: GPT, folder: str | Path) -> None:
    """Write a folder that transformers opens (see `export`). With a plan other than `full`, transformers
    finds no weights for the projections that the plan does without, and knows nothing of the plan; `load_hf`
    reads both."""
    from safetensors.torch import save

    c, folder = model.config, Path(folder)
    config, state = export(model)
    state = {name: p.cpu().contiguous() for name, p in state.items()}
    if c.tie_embeddings:
        del state["lm_head.weight"]
    gates = {name: state.pop(name) for name in list(state) if name.endswith("_gate")}
    files = {"config.json": (json.dumps(config, indent=1) + "\n").encode()}
    files["model.safetensors"] = save(state, metadata={"format": "pt"})
    if gates:
        files["nanokv.safetensors"] = save(gates, metadata={"format": "pt"})
    own = {name: getattr(c, name) for name in OWN} | {"plan": model.plan.spec}
    own["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["nanokv.json"] = (json.dumps(sealed(own), indent=1) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nanokv.safetensors").unlink(missing_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content)


def main():
    from train import load_run  # train.py reads folders through this file

    parser = Parser(__doc__)
    parser.add_argument("out_dir", metavar="RUN", help="a training run, for example out/demo/normal")
    parser.add_argument("folder", metavar="FOLDER", help="where config.json and model.safetensors go")
    args = parser.parse_args()
    model, _ = load_run(args.out_dir)
    save_hf(model, args.folder)
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        if (tokenizer := Path(args.out_dir) / name).exists():
            shutil.copyfile(tokenizer, Path(args.folder) / name)
    print(f"wrote {args.folder}: {model.config.vocab_size:,} tokens, plan {model.plan.spec}")


if __name__ == "__main__":
    run(main)
