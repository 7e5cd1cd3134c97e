"""Hugging Face checkpoint folders in and out (Llama with SmolLM, Mistral, Qwen2, Qwen3), and conversion to a
plan.

    python -m support.hf RUN FOLDER              # write a training run as such a folder
    model = load_hf("path/to/SmolLM2-135M")      # config.json and model*.safetensors
    save_hf(model, "path/to/mine")               # a folder that transformers opens

Needs the package safetensors. What a config asks for and this model does not have is refused by name; keys
that change nothing are passed over. A plan stands in config.json under "nanokv", its gates among the
weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import data
from kv_router import Plan, PlanError
from model import GPT, GPTConfig
from support import cli
from support.cli import Parser, UserError, checked, new_folder, out_of_memory, read_json, user_path
from support.runs import drop_retired, load_run

import torch
from torch import Tensor

FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
SIZES = {  # transformers' name of a setting -> ours
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
OWN = {"plan", "router_lowest", "forward_passes", "backward_passes"}  # what we add, under "nanokv"
NEUTRAL = {  # what a config may ask for and this model does not have -> the value that asks for nothing
    "hidden_act": "silu", "partial_rotary_factor": 1.0, "pretraining_tp": 1, "is_causal": True,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
UNREAD = {
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("mlp_bias",),
    "mistral": ("attention_bias", "mlp_bias"),
}
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
# Keys that change nothing here, because they are read elsewhere or ask for nothing.
SILENT = """architectures dtype torch_dtype transformers_version model_type use_cache return_dict id2label
    label2id
    initializer_range attention_dropout bos_token_id eos_token_id pad_token_id _name_or_path max_window_layers
    output_attentions output_hidden_states is_encoder_decoder problem_type original_max_position_embeddings
    rope_theta rope_scaling rope_parameters layer_types sliding_window use_sliding_window quantization_config
    nanokv""".split()
FETCH = "fetch the checkpoint folder again"


# --- config.json ------------------------------------------------------------------------------------------


def read_config(folder: str | Path, block_size: int | None = None) -> GPTConfig:
    """The model that a folder's config.json asks for, with a context of `block_size`, by default its own.
    UserError names what it asks for and this model does not have."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder here; download it first: hf download NAME --local-dir FOLDER")
    hf = read_json(path, FETCH)
    family = hf.get("model_type")
    if str(family) not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not known; valid are {', '.join(FAMILIES)}")
    sizes = {ours: hf[theirs] for theirs, ours in SIZES.items() if hf.get(theirs) is not None}
    sizes = checked(sizes, GPTConfig, path)
    if missing := {"vocab_size", "n_embd", "n_layer", "n_head"} - set(sizes):
        raise UserError(f"{path} lacks {', '.join(name for name, ours in SIZES.items() if ours in missing)}")
    sizes = {"tie_embeddings": False, "n_kv_head": 0, "norm_eps": 1e-6, "block_size": 2048} | sizes
    sizes["block_size"] = min(block_size or sizes["block_size"], sizes["block_size"])
    if not 0 < sizes["norm_eps"] < 1:
        raise UserError(f"{path} asks for rms_norm_eps = {sizes['norm_eps']!r}, which no model can have")
    refuse_what_we_lack(hf, family, sizes["block_size"], path)
    own = hf.get("nanokv", {})
    if isinstance(own, dict):
        drop_retired(own, path)
    own = checked(own, GPTConfig, f"{path}, nanokv")
    if unknown := set(own) - OWN:
        raise UserError(
            f"{path}: {min(unknown)!r} under nanokv is not known; valid are {', '.join(sorted(OWN))}"
        )
    rope = read_rope(hf, path)
    return GPTConfig(**sizes, **FAMILIES[family], **own, **rope, stop_tokens=stop_tokens(Path(folder), hf))


def refuse_what_we_lack(hf: dict, family: str, block_size: int, path: Path) -> None:
    """UserError for a key that transformers' model of this family reads, and that asks for more than we
    have."""

    def refuse(what: object):
        raise UserError(f"{path} asks for {what}, which this model does not have")

    for key, neutral in NEUTRAL.items():
        if hf.get(key) not in (None, neutral) and key not in UNREAD.get(family, ()):
            refuse(f"{key} = {hf[key]!r}")
    if hf.get("quantization_config"):
        refuse(f"quantization_config = {hf['quantization_config']!r}")
    if family == "llama":  # it reads neither windows nor kinds of layers
        return
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list):
        refuse(f"layer_types = {kinds!r}")
    if others := {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}:
        refuse(f"layers of type {min(others)!r}")
    windowed = "sliding_attention" in kinds or hf.get("use_sliding_window") or family == "mistral"
    window = hf.get("sliding_window", 4096 if family == "mistral" else None) if windowed else None
    if window and not isinstance(window, int):
        refuse(f"a sliding window of {window!r} tokens")
    if window and window < block_size:
        refuse(f"a sliding window of {window} tokens (load it with block_size={window} and none is needed)")


def read_rope(hf: dict, path: Path) -> dict:
    """rope_theta and rope_scaling, in the spelling of new (rope_parameters) or old transformers (the
    others)."""
    lacking = "which this model does not have"
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path} asks for rope scaling {rope!r}, {lacking}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{path} asks for rope scaling of type {kind!r}, {lacking}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path} asks for a partial_rotary_factor, {lacking}")
    numbers = {"rope_theta": rope.get("rope_theta") or hf.get("rope_theta") or 10000.0}
    if kind == "llama3":
        original = {"original_max_position_embeddings": hf.get("original_max_position_embeddings")}
        found = rope | (original if any(original.values()) else {})
        numbers |= {name: found.get(name) for name in sorted(LLAMA3_ROPE)}
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise UserError(f"{path} asks for {kind} rope with {name} = {value!r}, which no model can have")
    theta = float(numbers.pop("rope_theta"))
    if numbers and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise UserError(f"{path} asks for a high_freq_factor that is not above low_freq_factor")
    return {"rope_theta": theta, "rope_scaling": numbers or None}


def stop_tokens(folder: Path, hf: dict) -> list[int]:
    """The tokens that end a text: eos_token_id, a number or a list, of config.json and
    generation_config.json."""
    found = [hf.get("eos_token_id")]
    if (folder / "generation_config.json").exists():
        found.append(read_json(folder / "generation_config.json", FETCH).get("eos_token_id"))
    tokens = [token for ids in found for token in (ids if isinstance(ids, list) else [ids])]
    return sorted({token for token in tokens if isinstance(token, int) and token >= 0})


# --- reading ----------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model*.safetensors: one file, or several shards."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError("Hugging Face folders need the package safetensors: pip install safetensors") from e
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None)
        if pickled:
            raise UserError(f"{pickled} holds pickled weights, which can run code; convert to safetensors")
        raise UserError(f"{folder} has no model*.safetensors; {FETCH}")
    tensors = {}
    for file in files:
        try:
            found = load_file(file)
        except Exception as e:  # safetensors' own error type, for what is truncated or no safetensors at all
            if out_of_memory(e):
                raise
            what = f"is damaged or no safetensors file ({e})"
            with open(file, "rb") as start:
                if start.read(8) == b"version ":
                    what = "is a pointer of git-lfs in place of the weights; git lfs pull"
            raise UserError(f"{file} {what}; {FETCH}") from e
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{folder} has {min(twice)} in two of its files; {FETCH}")
        tensors |= found
    # A base model, without the output layer, has names without the prefix.
    bare = not any(name.startswith("model.") for name in tensors)
    tensors = {"model." * (bare and name != "lm_head.weight") + name: t for name, t in tensors.items()}
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def load_hf(folder: str | Path, block_size: int | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    """The model in a Hugging Face checkpoint folder, on the CPU.

    Raises UserError (one line) for a missing, truncated or pickled file, a tensor that is missing, of the
    wrong shape or not known, and for what its config asks and this model does not have."""
    folder = Path(folder)
    try:
        config = read_config(folder, block_size)
        with torch.device("meta"):  # takes no memory: settings in a file could ask for any size
            model = GPT(config)
    except PlanError as e:
        raise UserError(f"{folder}: {e}") from e
    known = {*SIZES, *SILENT, *NEUTRAL}
    keys = read_json(folder / "config.json", FETCH).items()
    if passed_over := sorted(key for key, value in keys if key not in known and value):
        print(f"{folder / 'config.json'}: passed over {', '.join(passed_over)}")
    tensors = read_tensors(folder)
    if config.tie_embeddings:  # the shared matrix can be stored under either name, or both
        names = ("model.embed_tokens.weight", "lm_head.weight")
        shared = [tensors[name] for name in names if name in tensors]
        tensors |= dict.fromkeys(names, shared[0]) if shared else {}
        if len(shared) == 2 and not torch.equal(*shared):
            raise UserError(
                f"{folder}: lm_head.weight differs, and tie_word_embeddings says that it is shared"
            )
    wanted = {hf_name(name): (name, p.shape) for name, p in model.state_dict().items()}
    state = {}
    for name in sorted(set(wanted) | set(tensors)):
        if name not in wanted:
            raise UserError(f"{folder} has a tensor {name}, which this model does not have")
        ours, shape = wanted[name]
        if (tensor := tensors.get(name)) is None:
            tied = " and tie_word_embeddings is false" if name == "lm_head.weight" else ""
            raise UserError(
                f"{folder} has no tensor {name}, which its config.json asks for{tied}; a shard may be missing"
            )
        if tensor.shape != shape:
            have, want = tuple(tensor.shape), tuple(shape)
            raise UserError(f"{folder}: tensor {name} is {have} and its config.json asks for {want}")
        state[ours] = tensor.to(dtype)
        if not tensor.is_floating_point() or not state[ours].isfinite().all():
            raise UserError(f"{folder}: tensor {name} is {tensor.dtype}, or not finite; {FETCH}")
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval()


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


# --- conversion to a plan ---------------------------------------------------------------------------------


def pretrained(folder: str, config: GPTConfig, corpus: Path) -> GPT:
    """The model in a Hugging Face folder with the context, plan and passes of `config`. UserError where the
    corpus was not tokenized with the folder's own tokenizer."""
    model = load_hf(folder, config.block_size)
    meta = data.read_meta(corpus)
    again = f"python data.py --tokenizer {Path(folder) / 'tokenizer.json'} --name NAME"
    if meta["vocab_size"] > model.config.vocab_size:
        raise UserError(
            f"{corpus} has a vocabulary of {meta['vocab_size']:,} and {folder} one of "
            f"{model.config.vocab_size:,}; tokenize with the folder's own: {again}"
        )
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        theirs, ours = Path(folder) / name, corpus / name
        if theirs.exists() and not (ours.exists() and data.sha256(ours) == data.sha256(theirs)):
            raise UserError(
                f"{corpus} was not tokenized with {theirs}, as the model's text was; tokenize it: {again}"
            )
    return convert(model, config.plan, **{name: getattr(config, name) for name in OWN - {"plan"}})


@torch.no_grad()
def convert(model: GPT, plan: str, **changes) -> GPT:
    """A model built for `plan` with the weights of `model`, without the projections that no layer reads any
    more; gates start as in a new model. PlanError where `model` lacks what the plan reads."""
    plan = Plan.parse(plan, model.config.n_layer)
    config = replace(model.config, **changes | {"plan": plan.spec})
    with torch.device(model.embed.weight.device):
        new = GPT(config).to(model.embed.weight.dtype)
    weights = model.state_dict()
    have = {name: p for name, p in new.state_dict().items()}
    if lacking := [name for name in have if name not in weights and not name.endswith("_gate")]:
        model.resolve(plan)  # says which layer reads what
        raise PlanError(f"plan {plan.spec!r} needs {lacking[0]}, which the model does not have")
    new.load_state_dict({name: weights.get(name, p) for name, p in have.items()})
    return new.eval()


# --- writing ----------------------------------------------------------------------------------------------


def export(model: GPT) -> tuple[dict, dict[str, Tensor]]:
    """What transformers needs to build the same model: its config and its weights, in the model's own memory.
    Qwen3 with QK-norm, Qwen2 with biases, otherwise Llama; UserError where none of them fits."""
    c = model.config
    if c.qk_norm and c.qkv_bias:
        raise UserError("no Hugging Face family here has both QK-norm and biases without one on the output")
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if family == "qwen2" and c.head_dim * c.n_head != c.n_embd:
        raise UserError(f"Qwen2 has head_dim n_embd / n_head, and this model {c.head_dim}")
    config = {theirs: getattr(c, ours) for theirs, ours in SIZES.items()}
    config |= {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }
    if c.rope_scaling:
        config["rope_parameters"] |= {"rope_type": "llama3", **c.rope_scaling}
    if c.stop_tokens:
        config["eos_token_id"] = c.stop_tokens
    return config, {hf_name(name): p.detach() for name, p in model.state_dict().items()}


def save_hf(model: GPT, folder: str | Path, tokenizer: str | Path | None = None) -> None:
    """Write a new folder that transformers opens (see `export`), with the tokenizer in `tokenizer`. With a
    plan other than `full`, transformers finds no weights for the projections that the plan does without; it
    knows nothing of the plan. `load_hf` does. UserError where the folder is there and not empty."""
    from safetensors.torch import save

    config, state = export(model)
    config["nanokv"] = {name: getattr(model.config, name) for name in sorted(OWN)} | {"plan": model.plan.spec}
    state = {name: p.cpu().contiguous() for name, p in state.items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    with new_folder(Path(folder)) as work:
        (work / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
        (work / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for name in data.TOKENIZER_FILES if tokenizer else ():
            if (Path(tokenizer) / name).exists():
                shutil.copyfile(Path(tokenizer) / name, work / name)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("out_dir", type=user_path, metavar="RUN", help="a training run, for example out/demo/normal")
    add("folder", type=user_path, metavar="FOLDER", help="a new folder, for the model and its tokenizer")
    args = parser.parse_args()
    model, _ = load_run(args.out_dir)
    save_hf(model, args.folder, args.out_dir)
    print(f"wrote {args.folder}: {model.config.vocab_size:,} tokens, plan {model.plan.spec}")


if __name__ == "__main__":
    cli.run(main)
