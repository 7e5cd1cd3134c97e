"""What can be set for a training run, and how its settings come together: from defaults, a TOML file and
flags, from the checkpoint that it continues, or from the Hugging Face folder that it starts from."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import hf
import parallel
from cli import UserError, checked, given_settings, setting
from kv_router import Plan
from model import MAX_CONTEXT, GPTConfig
from runs import find_checkpoint


@dataclass
class TrainConfig:
    out_dir: str = setting("out/run", "where checkpoints, logs and settings of this run go")
    init_from: str = setting(
        "scratch", "scratch; resume: from out_dir; hf:FOLDER: from a Hugging Face folder"
    )
    # the data
    dataset: str = setting(
        "python", "a tokenized corpus below data_dir; python and shakespeare are made when missing"
    )
    data_dir: str = setting("data", "where tokenized corpora live")
    # the model
    plan: str = setting("full", "KV-sharing plan to build and train; python kv_router.py --help lists them")
    router_p: float = setting(
        0.0, "stochastic KV routing: chance that a layer reads what a random lower layer reads; 0 is off"
    )
    router_lowest: int = setting(0, "stochastic KV routing: lowest layer that other layers may read")
    key_residual: bool = setting(False, "add the keys of layer router_lowest to those of all layers above it")
    forward_passes: int = setting(7, "cyclic plans: passes without gradient")
    backward_passes: int = setting(2, "cyclic plans: passes with gradient, after those")
    block_size: int = setting(256, "context length, in tokens")
    n_layer: int = setting(8, "layers")
    n_head: int = setting(4, "query heads")
    n_kv_head: int = setting(2, "key/value heads (GQA; 1 is MQA); 0 for as many as query heads")
    n_embd: int = setting(128, "width of the residual stream")
    head_dim: int = setting(0, "features per head; 0 for n_embd / n_head")
    n_hidden: int = setting(0, "hidden width of the MLP; 0 for 8/3 n_embd")
    tie_embeddings: bool = setting(True, "input and output embeddings are one matrix")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys")
    # optimization
    optimizer: str = setting("muon", "of the layers' matrices; the rest has AdamW", ("adamw", "muon"))
    batch_size: int = setting(16, "sequences per micro-step, on all devices together")
    gradient_accumulation_steps: int = setting(1, "micro-steps per step")
    max_iters: int = setting(600, "steps; 0 only evaluates and saves")
    learning_rate: float = setting(5e-3, "peak learning rate; for adamw 3e-3 is better")
    min_lr: float = setting(5e-4, "learning rate at the end of the cosine")
    warmup_iters: int = setting(50, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "weight decay, on matrices only")
    beta1: float = setting(0.9, "AdamW beta1")
    beta2: float = setting(0.95, "AdamW beta2")
    grad_clip: float = setting(1.0, "largest gradient norm; 0 is off")
    seed: int = setting(0, "seed of the weights, the order of the data, and the router")
    # looking at it
    eval_interval: int = setting(100, "steps between evaluations (and checkpoints)")
    eval_iters: int = setting(8, "batches of held-out windows per evaluation, always the same ones")
    log_interval: int = setting(10, "steps between log lines")
    sample_interval: int = setting(0, "steps between samples of text; 0 is off")
    # the machine
    device: str = setting("auto", "cpu, cuda, mps, cuda:1, ...; auto takes the fastest there is")
    dtype: str = setting(
        "auto", "of matrix products; auto: bfloat16 where it is fast", ("auto", "float32", "bfloat16")
    )
    compile: bool | None = setting(None, "torch.compile the layers; auto: where that pays within the run")
    shard: bool = setting(False, "under torchrun: split weights and moments over the devices (FSDP2)")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def micro_steps(self, start: int, end: int) -> range:
        """The numbers of the micro-steps of steps start .. end - 1: which batch and which plan they get."""
        return range(start * self.gradient_accumulation_steps, end * self.gradient_accumulation_steps)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that these settings ask for."""
        sizes = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}
        return GPTConfig(**sizes, vocab_size=vocab_size)


# What a resumed run may change; everything else must be as in the checkpoint.
FREE_ON_RESUME = {
    *("out_dir", "data_dir", "max_iters", "learning_rate", "min_lr", "eval_interval", "log_interval"),
    *("sample_interval", "device", "dtype", "compile", "shard"),
}

VALID = {  # settings: the smallest value, and the first that is too large
    (1, 1 << 31): "gradient_accumulation_steps eval_interval eval_iters log_interval",
    (1, MAX_CONTEXT + 1): "batch_size block_size",
    (0, 1 << 31): "max_iters warmup_iters sample_interval",
    (0, 1 << 63): "seed",
    (0, 1): "beta1 beta2",
    (0, math.inf): "learning_rate min_lr weight_decay grad_clip",
}


def settings(description: str) -> tuple[TrainConfig, Path | None, dict | None]:
    """The settings that the command line asks for and, where a run goes on from a checkpoint, that and its
    path. UserError for what is not valid or contradicts the checkpoint or the folder."""
    given = given_settings(TrainConfig, description)
    c = TrainConfig(**given)
    path = checkpoint = None
    if c.init_from == "resume":
        c, path, checkpoint = resumed(given)
    elif any((Path(c.out_dir) / name).exists() for name in ("ckpt.pt", "best.pt")):
        raise UserError(
            f"{c.out_dir} holds a run; continue it: --init_from=resume, or choose another --out_dir"
        )
    elif c.init_from.startswith("hf:"):
        c = like_folder(given, c.init_from[3:])
    elif c.init_from != "scratch":
        raise UserError(f"--init_from {c.init_from!r} is not valid; it is scratch, resume or hf:FOLDER")
    check(c)
    return c, path, checkpoint


def check(c: TrainConfig) -> None:
    """UserError for a setting that no run can have."""
    for (low, end), names in VALID.items():
        for name in names.split():
            if not low <= (value := getattr(c, name)) < end:
                limit = f"below {end}" if value >= end else f"{low} or more"
                raise UserError(f"--{name} {value} is not valid; it must be {limit}")
    if c.min_lr > c.learning_rate:
        raise UserError(f"--min_lr {c.min_lr} is above --learning_rate {c.learning_rate}; lower it too")
    if c.router_lowest and not 0 <= c.router_lowest < c.n_layer:
        raise UserError(f"--router_lowest {c.router_lowest} is not valid; it must be 0 to {c.n_layer - 1}")
    if c.key_residual and Plan.parse(c.plan, c.n_layer)[c.router_lowest].k != (c.router_lowest,):
        raise UserError(
            f"--key_residual adds K to that of layer {c.router_lowest}, which does not read its own in plan "
            f"{c.plan!r}; choose another --router_lowest or --plan, for example shared-v"
        )
    if c.batch_size % parallel.RANKS:
        raise UserError(
            f"--batch_size {c.batch_size} cannot be divided among {parallel.RANKS} ranks; give a multiple"
        )
    if c.shard and parallel.RANKS == 1:
        raise UserError(
            "--shard splits a model over several devices; start it with torchrun, or leave it out"
        )


def resumed(given: dict) -> tuple[TrainConfig, Path, dict]:
    """The settings of the run in --out_dir, changed by those given now, and its checkpoint. Only what
    FREE_ON_RESUME lists may change."""
    out_dir = TrainConfig(**given).out_dir
    path, checkpoint = find_checkpoint(Path(out_dir))
    before = checked(checkpoint["config"], TrainConfig, path)
    known = asdict(TrainConfig(**before))
    changes = {name: value for name, value in given.items() if name != "init_from" and value != known[name]}
    for name, value in changes.items():
        if name not in FREE_ON_RESUME:
            raise UserError(
                f"--{name} {value} contradicts {path}, trained with {known[name]}; "
                "leave it out, or start a new run in another --out_dir"
            )
        if name != "out_dir":
            print(f"--{name} {value} in place of {known[name]} from here on")
    # A run that was moved stays where it is now. Its init_from still says what it started from.
    return TrainConfig(**before | changes | {"out_dir": out_dir}), path, checkpoint


def like_folder(given: dict, folder: str) -> TrainConfig:
    """Settings with the sizes of the model in a Hugging Face folder."""
    c = TrainConfig(**given)
    found = asdict(hf.read_config(folder, c.block_size))
    sizes = {f.name: found[f.name] for f in fields(TrainConfig) if f.name in found}
    free = {"plan", "forward_passes", "backward_passes"}
    if not found["key_residual"]:
        free.add("router_lowest")
    for name in set(sizes) & set(given) - free:
        if sizes[name] != given[name]:
            raise UserError(
                f"--{name} {given[name]} contradicts {folder}, which has {sizes[name]}; leave it out"
            )
    return TrainConfig(**asdict(c) | sizes | given)
