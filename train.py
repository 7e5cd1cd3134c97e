"""Train a model: normally, under a fixed sharing plan (--plan), or with stochastic KV routing (--router_p).

python train.py config/demo.toml --out_dir=out/normal
python train.py config/demo.toml --out_dir=out/stochastic --router_p=0.5
python train.py config/demo.toml --out_dir=out/fusedkv --plan=fusedkv
python train.py --out_dir=out/normal --init_from=resume
"""

import fcntl
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import data
import hf
import kernels
from cli import (
    UserError,
    checked,
    duration,
    first_line,
    given_settings,
    read_json,
    replace_file,
    run,
    setting,
)
from kv_router import MAX_CONTEXT, Plan, StochasticRouter, check_size, costs, human
from model import GPT, GPTConfig, convert


@dataclass
class TrainConfig:
    out_dir: str = setting("out/run", "where checkpoints, logs and settings of this run go")
    init_from: str = setting("scratch", "scratch; resume: from out_dir/ckpt.pt; hf:FOLDER: Hugging Face's")
    # the data
    dataset: str = setting(
        "python", "a tokenized corpus below data_dir; python and shakespeare are made when missing"
    )
    data_dir: str = setting("data", "where tokenized corpora live")
    # the model
    plan: str = setting("full", "KV-sharing plan to build and train; python kv_router.py --help lists them")
    router_p: float = setting(
        0.0, "stochastic KV routing: chance that a layer reads what a random lower one reads; 0 is off"
    )
    router_above: bool = setting(False, "stochastic routing may also read layers above, which iterates")
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
    learning_rate: float = setting(3e-3, "peak learning rate")
    min_lr: float = setting(3e-4, "learning rate at the end of the cosine")
    warmup_iters: int = setting(50, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "AdamW weight decay, on matrices only")
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
    compile: bool = setting(False, "torch.compile the layers: pays on a GPU, or for long runs")
    shard: bool = setting(False, "under torchrun: split weights and moments over the devices (FSDP2)")


# What a resumed run may change; everything else must be as in the checkpoint.
FREE_ON_RESUME = {
    *("out_dir", "init_from", "data_dir", "max_iters", "eval_interval", "log_interval"),
    *("sample_interval", "device", "dtype", "compile", "shard"),
}


# --- runs on disk (sample.py, sweep.py and bench.py read them through load_run) ----------------------------


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, after its checksums and the types of its settings have been checked. Nothing in it is
    executed: it may hold tensors and plain values only. UserError (one line) says what is wrong with it."""
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one: python train.py --out_dir={path.parent}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip; torch.load ignores its checksums
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("its header lies about sizes")
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint.setdefault("plans", [])  # older ones have none
    except Exception as e:  # zip, pickle and tensor errors of a damaged file are of many kinds
        raise UserError(f"{path} cannot be read as a checkpoint ({first_line(e)})") from e
    kinds = {"model": dict, "optimizer": dict, "config": dict, "model_config": dict, "corpus": str}
    kinds |= {"step": int, "best_val_loss": float, "time": float, "plans": list}
    if not all(isinstance(checkpoint.get(k), kinds[k]) for k in kinds) or checkpoint["step"] < 0:
        raise UserError(f"{path} is not a checkpoint of nanokv; train one: python train.py --out_dir=NEW")
    config = TrainConfig(**checked(checkpoint["config"], TrainConfig, path))
    checked(checkpoint["model_config"], GPTConfig, path)
    settings = path.with_name("config.json")
    of_run = read_json(settings, "delete it: checkpoints hold it too") if settings.exists() else {}
    for name, value in asdict(config).items():
        if name not in FREE_ON_RESUME and of_run.get(name, value) != value:
            raise UserError(
                f"{path} is of another run than {settings}: {name} is {value} and {of_run[name]} there; "
                "delete the wrong one"
            )
    return checkpoint


def find_checkpoint(folder: Path, prefer: str | None = None) -> tuple[Path, dict]:
    """The newest good checkpoint of a run, or the one named `prefer`, if good. Says so on standard error when
    one had to be passed over."""
    good, errors = {}, []
    for name in dict.fromkeys((prefer or "ckpt.pt", "ckpt.pt", "best.pt")):
        path = folder / name
        if path.exists() and not (prefer and good):
            try:
                good[path] = load_checkpoint(path)
            except UserError as e:
                errors.append(str(e))
    if not good:
        none = f"no checkpoint in {folder}; train one: python train.py --out_dir={folder}"
        raise UserError(errors[0] if errors else none)
    path = max(good, key=lambda path: good[path]["step"])
    if not prefer and not errors and path.name != "ckpt.pt":  # a kill between the two
        errors = [f"{folder / 'ckpt.pt'} is missing or older"]
    for error in errors:
        print(f"{error}; taking {path} of step {good[path]['step']}", file=sys.stderr)
    return path, good[path]


def build(path: Path, checkpoint: dict) -> GPT:
    """The model in a checkpoint read from `path`."""
    try:
        config = GPTConfig(**checkpoint["model_config"])
        check_size(config, config.block_size, path.stat().st_size)
        model = GPT(config)
        model.load_state_dict(checkpoint["model"])
    except Exception as e:  # tensors and settings that do not fit each other fail in many ways
        raise UserError(f"{path} does not hold the model that its settings name ({first_line(e)})") from e
    return model


def load_run(out_dir: str | Path, device: str = "cpu") -> tuple[GPT, TrainConfig]:
    """The model and the settings of a training run: its best checkpoint, or where there is none its last."""
    folder = Path(out_dir)
    path, checkpoint = find_checkpoint(folder, prefer="best.pt")
    if (folder / "meta.json").exists():
        trained_on = data.read_meta(folder).get("train")
        if not isinstance(trained_on, dict) or trained_on.get("sha256") != checkpoint["corpus"]:
            raise UserError(f"{folder / 'meta.json'} is not of the corpus that {path} was trained on")
    return build(path, checkpoint).to(device).eval(), TrainConfig(**checkpoint["config"])


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not to be had here ({first_line(e)}); use --device auto") from e
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams and events belong to the current one
    return name


def device_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and why."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        fast, what = torch.cuda.is_bf16_supported(False), torch.cuda.get_device_name(device)  # no emulation
    else:
        fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
        what = f"this {device.upper()}"
    return (torch.bfloat16, f"{what} has it") if fast else (torch.float32, f"{what} has no fast bfloat16")


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, the best of five: what a training step could reach."""
    n, best = 8192 if device.startswith("cuda") else 1024, math.inf
    x = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6 if device != "cpu" or dtype == torch.float32 else 2):
        began = time.perf_counter()
        x[0, 0] = (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def autocast(device: str | torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(str(device).split(":")[0], dtype)


# --- several devices: torchrun sets these ------------------------------------------------------------------

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: str) -> str:
    """Meet the other ranks, each with its share of every batch; returns this rank's own device."""
    if RANKS == 1:
        return device
    if device.startswith("cuda"):
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"torchrun started more processes than the {there} GPUs; lower --nproc_per_node")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def over_ranks(x: Tensor, op: str = "mean") -> Tensor:
    """The mean, or another reduction, of all ranks' x."""
    if RANKS > 1:
        dist.all_reduce(x, dist.ReduceOp.SUM if op == "mean" else getattr(dist.ReduceOp, op))
    return x / RANKS if op == "mean" else x


def on_device(x: Tensor, device: str) -> Tensor:
    """A copy there; on a GPU it is made while the GPU still computes, from memory that cannot be swapped."""
    return x.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else x.to(device)


def average_gradients(params: Iterable[Tensor]) -> None:
    """Data parallelism. Routing leaves other layers' K and V unread, and without gradients, at every step;
    but all ranks draw the same plan, so what is there is there on all of them."""
    grads = [p.grad for p in params if p.grad is not None]
    for work in [dist.all_reduce(g, async_op=True) for g in grads]:
        work.wait()
    for g in grads:
        g /= RANKS


def shard(model: GPT, device: str) -> None:
    """FSDP2: every rank keeps its part of each weight, gradient and moment, and gathers a layer's weights
    while that layer runs. No device ever holds the whole model: layers move there one by one."""
    mesh = init_device_mesh(device.split(":")[0], (RANKS,))
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # values are one; nothing writes into them
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "kv")  # a layer runs in two steps
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "losses")


def gathered(tree):
    """A state_dict with whole tensors in place of parts; every rank must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    return [gathered(value) for value in tree] if isinstance(tree, list) else tree


# --- evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def window_losses(
    model: GPT,
    tokens: data.Tokens,
    n: int,
    batch_size: int,
    plan: Plan | Callable[[int], Plan] | None = None,
    context=nullcontext,
) -> np.ndarray:
    """Mean loss of each of n held-out windows, in nats per token; `plan` may be a function of the batch."""
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    rows = []
    for i, (x, y) in enumerate(tokens.held_out(n, batch_size)):
        with context():
            losses = model.losses(x.to(device), y.to(device), plan(i) if callable(plan) else plan)
        rows.append(losses.mean(dim=1).float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows)


def bits_per_byte(nats_per_token: float, tokens: data.Tokens) -> float:
    return nats_per_token / math.log(2) / tokens.bytes_per_token


# --- training ---------------------------------------------------------------------------------------------


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    done = (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * min(done, 1))) * (c.learning_rate - c.min_lr)


class Muon(torch.optim.AdamW):
    """Muon (Jordan, 2024) for parameter groups with `muon`, AdamW for the others: a matrix moves along its
    momentum made orthogonal, scaled to the size of AdamW's steps (arXiv 2502.16982), so that both can share a
    learning rate. torch.optim.Muon always computes in bfloat16, which most CPUs only emulate."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape are made orthogonal together
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("step", torch.tensor(0.0))  # AdamW expects one when it loads a state
                    momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, 0.95)))  # Nesterov
                    p.grad = None  # AdamW passes it by
            for shape, pairs in by_shape.items():
                whole = [m.full_tensor() if isinstance(m, DTensor) else m for _, m in pairs]
                for (p, _), update in zip(pairs, orthogonal(torch.stack(whole))):
                    if isinstance(p, DTensor):
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])
        super().step()


def orthogonal(x: Tensor) -> Tensor:
    """Of each matrix (n, a, b) = U S V^T about U V^T, by five steps of a Newton-Schulz iteration."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    dtype, x = x.dtype, x.bfloat16() if x.is_cuda else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.to(dtype)


def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the layers; weight decay for matrices, none for norms, biases and
    fusion gates."""
    layers = {p for p in model.blocks.parameters() if p.dim() == 2}
    tables = [p for p in model.parameters() if p.dim() == 2 and p not in layers]
    others = [p for p in model.parameters() if p.dim() != 2]
    layers = [p for p in model.parameters() if p in layers]
    groups = [
        {"params": layers, "weight_decay": c.weight_decay, "muon": c.optimizer == "muon"},
        {"params": tables, "weight_decay": c.weight_decay, "muon": False},
        {"params": others, "weight_decay": 0.0, "muon": False},
    ]
    kind = Muon if c.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


VALID = {  # settings: the smallest value, and the first that is too large
    (1, 1 << 31): "gradient_accumulation_steps eval_interval eval_iters log_interval",
    (1, MAX_CONTEXT + 1): "batch_size block_size",
    (0, 1 << 31): "max_iters warmup_iters sample_interval",
    (0, 1 << 63): "seed",
    (0, 1): "beta1 beta2",
    (0, math.inf): "learning_rate min_lr weight_decay grad_clip",
}


def settings() -> tuple[TrainConfig, Path, dict | None]:
    """This run's settings, and the checkpoint it goes on from, if any, with its path."""
    given = given_settings(TrainConfig, __doc__)
    c = TrainConfig(**given)
    path, checkpoint = Path(c.out_dir) / "ckpt.pt", None
    if c.init_from == "resume":
        path, checkpoint = find_checkpoint(path.parent)
        before = asdict(TrainConfig(**checkpoint["config"]))
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != before[name]:
                raise UserError(
                    f"--{name} {value} contradicts {path}, trained with {before[name]}; "
                    "leave it out, or start anew in another --out_dir"
                )
            if name not in ("out_dir", "init_from") and value != before[name]:
                print(f"--{name} {value} in place of {before[name]} from here on")
        c = TrainConfig(**before | given | {"out_dir": c.out_dir})  # a moved run stays where it is now
    elif c.init_from != "scratch" and not c.init_from.startswith("hf:"):
        raise UserError(f"--init_from {c.init_from!r} is not valid; it is scratch, resume or hf:FOLDER")
    elif path.exists() or path.with_name("best.pt").exists():
        raise UserError(
            f"{c.out_dir} holds a run; go on with it: --init_from=resume, or choose another --out_dir"
        )
    elif c.init_from.startswith("hf:"):
        found = asdict(hf.read_config(c.init_from[3:], c.block_size))
        shape = {f.name: found[f.name] for f in fields(TrainConfig) if f.name in found}
        for name in set(shape) & set(given) - {"plan", "forward_passes", "backward_passes"}:
            if shape[name] != given[name]:
                raise UserError(
                    f"--{name} {given[name]} contradicts {c.init_from[3:]}, which has {shape[name]}"
                )
        c = TrainConfig(**asdict(c) | shape | given)
    for (low, end), names in VALID.items():
        for name in names.split():
            if not low <= (value := getattr(c, name)) < end:
                limit = f"below {end}" if value >= end else f"{low} or more"
                raise UserError(f"--{name} {value} is not valid; it must be {limit}")
    if c.min_lr > c.learning_rate:
        raise UserError(f"--min_lr {c.min_lr} is above --learning_rate {c.learning_rate}; lower it too")
    if c.router_above and not c.router_p:
        raise UserError("--router_above goes with --router_p; give both")
    if c.batch_size % RANKS:
        raise UserError(f"--batch_size {c.batch_size} cannot be divided among {RANKS} ranks; give a multiple")
    if c.shard and RANKS == 1:
        raise UserError(
            "--shard splits a model over several devices; start it with torchrun, or leave it out"
        )
    return c, path, checkpoint


def model_config(c: TrainConfig, vocab_size: int) -> GPTConfig:
    sizes = {f.name: getattr(c, f.name) for f in fields(GPTConfig) if hasattr(c, f.name)}
    return GPTConfig(**sizes, vocab_size=vocab_size)


def pretrained(c: TrainConfig, train: data.Tokens) -> GPT:
    """The model in a Hugging Face folder, converted to --plan on 16 windows of the training text."""
    model = hf.load_hf(c.init_from[3:], c.block_size)
    if train.meta["vocab_size"] > model.config.vocab_size:
        raise UserError(
            f"{train.path.parent} has a vocabulary of {train.meta['vocab_size']:,} and {c.init_from[3:]} "
            f"one of {model.config.vocab_size:,}; tokenize with the folder's own: python data.py "
            f"--tokenizer {Path(c.init_from[3:]) / 'tokenizer.json'}"
        )
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        theirs, ours = Path(c.init_from[3:]) / name, train.path.with_name(name)
        if theirs.exists() and not (ours.exists() and data.sha256(ours) == data.sha256(theirs)):
            raise UserError(
                f"{train.path.parent} was not tokenized with {theirs}, as the model's text was; make one "
                f"that is: python data.py --tokenizer {theirs} --name NAME"
            )
    model.config.forward_passes, model.config.backward_passes = c.forward_passes, c.backward_passes
    if Plan.parse(c.plan, c.n_layer) != model.plan:
        model = convert(model, c.plan, [x for x, _ in train.held_out(16, 4)])
    return model.train()


def restore(optimizer: torch.optim.Optimizer, checkpoint: dict, path: Path) -> None:
    """Load the optimizer's moments; its settings are those of the run, whatever the file says."""
    params = [(p, group["muon"]) for group in optimizer.param_groups for p in group["params"]]

    def of(i: int, moments: dict) -> dict:
        p, muon = params[i]
        names = ["momentum"] if muon else ["exp_avg", "exp_avg_sq"]
        wanted = {"step": torch.Size(())} | dict.fromkeys(names, p.shape)
        if {name: t.shape for name, t in moments.items()} != wanted:
            raise ValueError("its moments are not those of these weights")
        if not isinstance(p, DTensor):
            return moments
        parts = {n: distribute_tensor(t, p.device_mesh, p.placements) for n, t in moments.items() if t.dim()}
        return moments | parts

    try:
        state = {i: of(i, moments) for i, moments in checkpoint["optimizer"]["state"].items()}
        if bool(state) != bool(checkpoint["step"]):
            raise ValueError("it has no moments")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except Exception as e:  # whatever a file can hold in place of tensors
        raise UserError(f"{path} does not hold the state of this optimizer ({first_line(e)})") from e


def git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    except OSError:
        return None


class Log:
    """log.jsonl: one object a line. A run resumed after `step` drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int | None):
        kept, damaged = [], 0
        old = path.read_text(errors="replace") if step is not None and path.exists() else ""
        for line in old.split("\n"):
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += bool(line)  # a killed run can leave half a line
        if damaged:
            print(f"{path}: left out {damaged} damaged line(s)")
        replace_file(path, "".join(kept).encode())
        self.file = open(path, "a")

    def __call__(self, **row):
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as e:
            raise UserError(f"cannot write {self.file.name}: {e.strerror}; mend that and resume") from e


def claim(path: Path):
    """Open a run's file for writing, and hold it against other runs until it is closed or the process ends,
    however that ends. UserError where another run holds it."""
    file = open(path, "a", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o666))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another run is at work in {path.parent}; choose another --out_dir") from e
    return file


def main():
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    c, path, checkpoint = settings()
    device = join_ranks(pick_device(c.device))
    dtype, reason = pick_dtype(c.dtype, device)
    router = StochasticRouter(c.n_layer, c.router_p, c.seed, c.router_above, c.plan) if c.router_p else None
    sizes = model_config(c, vocab_size=1)  # a mistake shows before a corpus is made
    n_params = costs(Plan.parse(c.plan, c.n_layer), sizes).params
    memory = device_memory(device) * (RANKS if c.shard else 1)
    if 16 * n_params > memory:  # weights, gradients, two moments
        need = f"{human(n_params)} parameters need {human(16 * n_params, 'B')} to train"
        raise UserError(f"{need} and {device} has {human(memory, 'B')}; lower --n_layer or --n_embd")
    folder = Path(c.data_dir) / c.dataset
    if RANK == 0 and not folder.exists() and not checkpoint:  # a checkpoint's path is not one to write to
        data.prepare_dataset(c.dataset, folder)
    if RANKS > 1:
        dist.barrier()
    train, val = (data.Tokens(folder, split, c.block_size) for split in ("train", "val"))
    corpus = train.meta["train"]["sha256"]

    torch.manual_seed(c.seed)
    start, best, seconds = 0, math.inf, 0.0
    if checkpoint:
        model = build(path, checkpoint)
    elif c.init_from.startswith("hf:"):
        model = pretrained(c, train)
    else:
        model = GPT(model_config(c, train.meta["vocab_size"]))
    if checkpoint:
        if checkpoint["corpus"] != corpus:
            raise UserError(
                f"{folder} is not the corpus that {c.out_dir} was trained on; use that or a new --out_dir"
            )
        start, best, seconds = checkpoint["step"], checkpoint["best_val_loss"], checkpoint["time"]
        if start >= c.max_iters:
            known = f", best val {best:.4f} nats/token" if math.isfinite(best) else ""
            print(f"{c.out_dir}: all {start} steps are done{known}; more: --max_iters")
            return
    n_params = sum(p.numel() for p in model.parameters())
    if c.compile:
        kernels.compile_model(model)
    if c.shard:
        shard(model, device)
    model.to(device)
    optimizer = make_optimizer(model, c)
    if checkpoint:
        restore(optimizer, checkpoint, path)

    out = Path(c.out_dir) if RANK == 0 else Path(os.devnull)
    device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    tokens_per_step = c.batch_size * c.gradient_accumulation_steps * c.block_size
    peak = matmul_peak(device, dtype)
    sequence_flops = costs(model.plan, model.config, c.block_size).train_flops
    info = {
        "command": shlex.join(sys.argv), "commit": git_commit(), "python": platform.python_version(),
        "torch": torch.__version__, "device": device_name, "threads": torch.get_num_threads(),
        "dtype": str(dtype), "parameters": n_params, "plan": model.plan.spec, "corpus": corpus,
        "ranks": RANKS, "matmul_flops_per_s": peak,
    }  # fmt: skip
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        run_file = claim(out / "run.json")
        if not checkpoint and any(out.glob("*.pt")):
            raise UserError(f"another run has just filled {out}; choose another --out_dir")
        for name in ("meta.json", "tokenizer.tiktoken", "tokenizer.json"):  # to be sampled without its corpus
            if (folder / name).exists():
                replace_file(out / name, (folder / name).read_bytes())
        replace_file(out / "config.json", (json.dumps(asdict(c), indent=1) + "\n").encode())
        run_file.truncate(0)
        run_file.write(json.dumps(info, indent=1) + "\n")
        run_file.flush()
    how = f"plan {c.plan}" + (f" with stochastic routing, p = {c.router_p}" if router else "")
    print(f"{c.out_dir}: {n_params:,} parameters, {how}, {c.max_iters} steps of {tokens_per_step:,} tokens")
    compiled = "compiled" if c.compile else "not compiled"
    print(f"{device_name}, {str(dtype).removeprefix('torch.')} ({reason}), {compiled}")
    if checkpoint:
        print(f"resumed after step {start}, from {path}")

    began = time.monotonic()
    saved = (path, start) if checkpoint else None  # the last good checkpoint
    plans = list(map(str, checkpoint["plans"])) if checkpoint else []  # drawn since the last log line
    unchecked = []  # loss and gradient norm of the steps since the last log line or checkpoint

    def clock() -> float:
        return seconds + time.monotonic() - began

    def stop(what: str, cure: str):
        last = "no checkpoint is there"
        if saved and saved[0].exists():
            last = f"the last good checkpoint is {saved[0]} of step {saved[1]}"
        raise UserError(f"{what}; {last}; {cure}")

    def check(step: int):
        """Stop at the first loss or gradient that is not finite. Looked at only when it is logged or about to
        be saved, so that a GPU need not be waited for at every step."""
        values = torch.stack(unchecked).tolist() if unchecked else []
        for n, pair in enumerate(values, step - len(values) + 1):
            for name, value in zip(("loss", "gradient norm"), pair):
                if not math.isfinite(value):
                    micro = range((n - 1) * c.gradient_accumulation_steps, n * c.gradient_accumulation_steps)
                    drawn = [router.plan(i).spec for i in micro] if router else [model.plan.spec]
                    what = f"the {name} became {value} by step {n}; plan: {', '.join(drawn)}"
                    stop(what, "lower --learning_rate")
        unchecked.clear()

    def save(step: int, is_best: bool):
        nonlocal saved
        state = gathered({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if RANK:
            return
        state |= {
            "step": step, "plans": plans,
            "config": asdict(c), "model_config": asdict(model.config), "corpus": corpus,
            "best_val_loss": best, "time": clock(),
        }  # fmt: skip
        moments = (t for s in state["optimizer"]["state"].values() for t in s.values())
        if not all(t.isfinite().all() for t in (*state["model"].values(), *moments)):
            stop(f"the weights became infinite or nan by step {step}", "lower --learning_rate")
        content = io.BytesIO()
        torch.save(state, content)
        for name in ("best.pt", "ckpt.pt") if is_best else ("ckpt.pt",):  # a kill in between loses no best
            try:
                replace_file(out / name, content.getbuffer())
            except OSError as e:
                stop(f"cannot save step {step} to {out / name}: {e.strerror}", "mend that and resume")
            saved = out / name, step

    def evaluate(step: int, plan: Callable[[int], Plan] | None = None) -> float:
        n = c.eval_iters * c.batch_size
        losses = window_losses(model, val, n, c.batch_size, plan, lambda: autocast(device, dtype))
        loss = float(losses.mean())
        if not math.isfinite(loss):
            stop(f"the loss became {loss} by step {step}", "lower --learning_rate")
        return loss

    log = Log(out / "log.jsonl", start if checkpoint else None) if RANK == 0 else lambda **row: None
    interrupted = []

    def interrupt(signum, frame):  # finish the step, save, leave; a second signal leaves at once
        interrupted.append(signum)
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step to save it; once more leaves at once\n")

    handlers = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    timed_steps, timed_since = 0, time.monotonic()  # training only: evaluation is left out of tokens/s
    for step in range(start, c.max_iters + 1):
        paused = time.monotonic()
        if RANKS > 1 and over_ranks(torch.tensor(len(interrupted), device=device), "MAX"):
            interrupted = interrupted or [signal.SIGTERM]  # some rank was: all stop at the same step
        leaving = bool(interrupted)  # a signal that comes later in this step is heard at the next
        due, is_best = step % c.eval_interval == 0 or step == c.max_iters, False
        if due or leaving:
            check(step)
        if due and not (checkpoint and step == start):  # that one is on record
            loss = goal = evaluate(step)
            row = {"val_loss": loss, "val_bpb": bits_per_byte(loss, val)}
            if router:  # full caches are only one of the plans it trains: the best step is best over draws
                goal = row["val_loss_routed"] = evaluate(step, router.plan)
            log(step=step, **row, tokens=step * tokens_per_step, time=clock())
            if step or not c.max_iters:  # of the steps that are saved: two checkpoints to rely on
                is_best, best = goal < best, min(goal, best)
            note = f"  {goal:.4f} over drawn plans" if router else ""
            text = f"step {step:5}  val {loss:.4f} nats/token  {row['val_bpb']:.4f} bits/byte{note}"
            print(text, flush=True)
        if (due and (step > start or step == c.max_iters)) or leaving:
            save(step, is_best)
        if c.sample_interval and step > start and step % c.sample_interval == 0:
            show_sample(model, folder, device)
        timed_since += time.monotonic() - paused
        if step == c.max_iters or leaving:
            break

        lr = learning_rate(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for micro in range(step * c.gradient_accumulation_steps, (step + 1) * c.gradient_accumulation_steps):
            x, y = train.batch(micro, c.batch_size, c.seed)
            plan = router.plan(micro) if router else None
            plans += [plan.spec] if router else []
            x, y = (on_device(t[RANK::RANKS], device) for t in (x, y))
            with autocast(device, dtype):
                loss = model(x, y, plan=plan)[1] / c.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if RANKS > 1 and not c.shard:
            average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = over_ranks(total)
        unchecked.append(torch.stack((total, norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timed_steps += 1

        done = step + 1
        if done % c.log_interval == 0 or done == c.max_iters or interrupted:
            check(done)
            total = float(total)
            speed = timed_steps * tokens_per_step / (time.monotonic() - timed_since)
            row = {"step": done, "train_loss": total, "lr": lr, "tokens": done * tokens_per_step}
            row |= {"tokens_per_s": speed, "flops_per_s": speed / c.block_size * sequence_flops}
            log(**row, time=clock(), **({"plans": plans} if router else {}))
            left = duration((c.max_iters - done) * tokens_per_step / speed)
            drawn = f"  drew {plans[-1]}" if router else ""
            share = f"{row['flops_per_s'] / peak / RANKS:.0%} of peak"
            text = (
                f"step {done:5}  loss {total:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s ({share})  {left} left"
            )
            text += drawn
            print(text, flush=True)
            plans = []

    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if leaving:
        command = f"python train.py --out_dir={c.out_dir} --init_from=resume"
        print(f"stopped and saved after step {step}; go on: {command}")
        sys.exit(128 + interrupted[0])
    over = " over drawn plans" if router else ""
    bpb = bits_per_byte(best, val)
    print(f"{c.out_dir}: {duration(clock())}, best val {best:.4f} nats/token, {bpb:.4f} bits/byte{over}")


def show_sample(model: GPT, folder: Path, device: str):
    """A few lines of text, uncompiled: sampling changes shapes at every step."""
    enc = data.load_tokenizer(folder)
    prompt = torch.tensor([[enc.eot_token]], device=device)
    with torch.compiler.set_stance("force_eager"):
        ids = model.generate(prompt, min(64, model.config.block_size - 1), temperature=0.8, top_k=50, seed=0)
    text = b"".join(data.token_bytes(enc, i) for i in ids[0, 1:].tolist()).decode(errors="replace")
    print("  | " + text.replace("\n", "\n  | "), flush=True)


if __name__ == "__main__":
    run(main)
