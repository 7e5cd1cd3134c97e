"""Train a model: normally, under a fixed sharing plan (--plan), or with stochastic KV routing (--router_p).

python train.py config/demo.toml --out_dir=out/normal
python train.py config/demo.toml --out_dir=out/stochastic --router_p=0.5
python train.py config/demo.toml --out_dir=out/fusedkv --plan=fusedkv
python train.py --out_dir=out/normal --init_from=resume
"""

import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import data
import hf
import kernels
from cli import UserError, duration, first_line, given_settings, run, setting
from kv_router import Plan, StochasticRouter
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
        0.0, "stochastic KV routing: chance that a layer reads a random lower layer's KV; 0 is off"
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
    batch_size: int = setting(16, "sequences per micro-step")
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


# What a resumed run may change; everything else must be as in the checkpoint.
FREE_ON_RESUME = {
    *("out_dir", "init_from", "data_dir", "max_iters", "eval_interval", "eval_iters", "log_interval"),
    *("sample_interval", "device", "dtype", "compile"),
}


# --- runs on disk (sample.py, sweep.py and bench.py read them through load_run) ----------------------------


def load_checkpoint(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one: python train.py --out_dir={path.parent}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and tensor errors of a damaged file are of many kinds
        raise UserError(f"{path} cannot be read as a checkpoint ({first_line(e)})") from e
    if not isinstance(checkpoint, dict) or not {"model", "model_config", "config", "corpus"} <= set(
        checkpoint
    ):
        raise UserError(f"{path} is not a checkpoint of nanokv; train one: python train.py --out_dir=NEW")
    return checkpoint


def load_run(out_dir: str | Path, device: str = "cpu") -> tuple[GPT, TrainConfig]:
    """The model and the settings of a training run: its best checkpoint, or where there is none its last."""
    folder = Path(out_dir)
    path = folder / "best.pt"
    checkpoint = load_checkpoint(path if path.exists() else folder / "ckpt.pt")
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), TrainConfig(**checkpoint["config"])


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not to be had here ({first_line(e)}); use --device auto") from e
    return name


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


def autocast(device: str, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype)


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


def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for the matrices, none for norms, biases and fusion gates."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


AT_LEAST = {  # the smallest valid value of a setting
    1: "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval block_size",
    0: "max_iters learning_rate min_lr warmup_iters weight_decay beta1 beta2 grad_clip seed sample_interval",
}


def settings() -> tuple[TrainConfig, dict | None]:
    """This run's settings, and the checkpoint it goes on from, if any."""
    given = given_settings(TrainConfig, __doc__)
    c = TrainConfig(**given)
    checkpoint = None
    path = Path(c.out_dir) / "ckpt.pt"
    if c.init_from == "resume":
        checkpoint = load_checkpoint(path)
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != checkpoint["config"][name]:
                raise UserError(
                    f"--{name} {value} contradicts {path}, trained with {checkpoint['config'][name]}; "
                    "leave it out, or start anew in another --out_dir"
                )
        c = TrainConfig(**checkpoint["config"] | given)
    elif c.init_from != "scratch" and not c.init_from.startswith("hf:"):
        raise UserError(f"--init_from {c.init_from!r} is not valid; it is scratch, resume or hf:FOLDER")
    elif path.exists():
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
    for low, names in AT_LEAST.items():
        for name in names.split():
            if not getattr(c, name) >= low:
                raise UserError(f"--{name} {getattr(c, name)} is not valid; it must be {low} or more")
    if c.min_lr > c.learning_rate:
        raise UserError(f"--min_lr {c.min_lr} is above --learning_rate {c.learning_rate}; lower it too")
    if c.router_above and not c.router_p:
        raise UserError("--router_above goes with --router_p; give both")
    if max(c.beta1, c.beta2) >= 1:
        raise UserError(f"--beta1 {c.beta1} and --beta2 {c.beta2} must be below 1")
    if c.router_p and Plan.parse(c.plan, c.n_layer).spec != "full":
        raise UserError(
            "--router_p trains one model for all plans and --plan one for a single plan; give one of them"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("training runs on one device so far; start it without torchrun")
    return c, checkpoint


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
    model.config.forward_passes, model.config.backward_passes = c.forward_passes, c.backward_passes
    if Plan.parse(c.plan, c.n_layer) != model.plan:
        model = convert(model, c.plan, [x for x, _ in train.held_out(16, 4)])
    return model.train()


def git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    except OSError:
        return None


class Log:
    """log.jsonl: one object a line. A resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int):
        kept = []
        for line in path.read_text().splitlines() if step and path.exists() else []:
            if line.endswith("}") and json.loads(line)["step"] <= step:  # a killed run can leave half a line
                kept.append(line + "\n")
        replace_file(path, lambda work: work.write_text("".join(kept)))
        self.file = open(path, "a")

    def __call__(self, **row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside and rename: a reader finds the old file or the new one, never half of one."""
    work = path.with_name(path.name + ".tmp")
    write(work)
    os.replace(work, path)


def main():
    c, checkpoint = settings()
    device = pick_device(c.device)
    dtype, reason = pick_dtype(c.dtype, device)
    router = StochasticRouter(c.n_layer, c.router_p, c.seed, c.router_above) if c.router_p else None
    Plan.parse(model_config(c, vocab_size=1).plan, c.n_layer)  # a mistake shows before a corpus is made
    folder = Path(c.data_dir) / c.dataset
    if not folder.exists():
        data.prepare_dataset(c.dataset, folder)
    train, val = (data.Tokens(folder, split, c.block_size) for split in ("train", "val"))
    corpus = train.meta["train"]["sha256"]

    torch.manual_seed(c.seed)
    start, best, seconds = 0, math.inf, 0.0
    if c.init_from.startswith("hf:"):
        model = pretrained(c, train)
    else:
        model = GPT(
            GPTConfig(**checkpoint["model_config"])
            if checkpoint
            else model_config(c, train.meta["vocab_size"])
        )
    if checkpoint:
        if checkpoint["corpus"] != corpus:
            raise UserError(
                f"{folder} is not the corpus that {c.out_dir} was trained on; use that or a new --out_dir"
            )
        model.load_state_dict(checkpoint["model"])
        start, best, seconds = checkpoint["step"], checkpoint["best_val_loss"], checkpoint["time"]
        if start >= c.max_iters:
            print(
                f"{c.out_dir}: all {start} steps are done, best val {best:.4f} nats/token; more: --max_iters"
            )
            return
    model.to(device)
    optimizer = make_optimizer(model, c)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if c.compile:
        kernels.compile_model(model)

    out = Path(c.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in (
        "meta.json",
        "tokenizer.tiktoken",
        "tokenizer.json",
    ):  # so that a run can be sampled without its corpus
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    (out / "config.json").write_text(json.dumps(asdict(c), indent=1) + "\n")
    device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    n_params = sum(p.numel() for p in model.parameters())
    info = {
        "command": shlex.join(sys.argv), "commit": git_commit(), "python": platform.python_version(),
        "torch": torch.__version__, "device": device_name, "threads": torch.get_num_threads(),
        "dtype": str(dtype), "parameters": n_params, "plan": model.plan.spec, "corpus": corpus,
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(info, indent=1) + "\n")
    tokens_per_step = c.batch_size * c.gradient_accumulation_steps * c.block_size
    how = f"stochastic routing, p = {c.router_p}" if router else f"plan {c.plan}"
    print(f"{c.out_dir}: {n_params:,} parameters, {how}, {c.max_iters} steps of {tokens_per_step:,} tokens")
    compiled = "compiled" if c.compile else "not compiled"
    print(f"{device_name}, {str(dtype).removeprefix('torch.')} ({reason}), {compiled}")
    if start:
        print(f"resumed after step {start}")

    def save(step: int, is_best: bool):
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "corpus": corpus,
        }
        state |= {
            "config": asdict(c),
            "model_config": asdict(model.config),
            "best_val_loss": best,
            "time": clock(),
        }
        for name in ("best.pt", "ckpt.pt") if is_best else ("ckpt.pt",):
            replace_file(out / name, lambda work: torch.save(state, work))

    def clock() -> float:
        return seconds + time.time() - began

    def finite(loss: float, step: int) -> float:
        if not math.isfinite(loss):
            last = (
                f"{out / 'ckpt.pt'} has the last good step"
                if (out / "ckpt.pt").exists()
                else "nothing is saved yet"
            )
            raise UserError(f"the loss became {loss} by step {step}; {last}; lower --learning_rate")
        return loss

    def evaluate(step: int, plan: Callable[[int], Plan] | None = None) -> float:
        n = c.eval_iters * c.batch_size
        losses = window_losses(model, val, n, c.batch_size, plan, lambda: autocast(device, dtype))
        return finite(float(losses.mean()), step)

    log = Log(out / "log.jsonl", start)
    interrupted = []

    def interrupt(signum, frame):  # finish the step, save, leave; a second signal leaves at once
        interrupted.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    began = time.time()
    timed_steps, timed_since = 0, began  # training only: evaluation is left out of tokens/s
    plans = []  # drawn since the last log line
    for step in range(start, c.max_iters + 1):
        paused = time.time()
        due, is_best = step % c.eval_interval == 0 or step == c.max_iters, False
        if due and not (checkpoint and step == start):  # that one is on record
            loss = goal = evaluate(step)
            row = {"val_loss": loss, "val_bpb": bits_per_byte(loss, val)}
            if router:  # full caches are only one of the plans it trains: the best step is best over draws
                goal = row["val_loss_routed"] = evaluate(step, router.plan)
            log(step=step, **row, tokens=step * tokens_per_step, time=clock())
            is_best, best = goal < best, min(goal, best)
            note = f"  {goal:.4f} over drawn plans" if router else ""
            text = f"step {step:5}  val {loss:.4f} nats/token  {row['val_bpb']:.4f} bits/byte{note}"
            print(text, flush=True)
        if (due and (step > start or step == c.max_iters)) or interrupted:
            save(step, is_best)
        if c.sample_interval and step > start and step % c.sample_interval == 0:
            show_sample(model, out, device)
        timed_since += time.time() - paused
        if step == c.max_iters or interrupted:
            break

        lr = learning_rate(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for micro in range(step * c.gradient_accumulation_steps, (step + 1) * c.gradient_accumulation_steps):
            x, y = train.batch(micro, c.batch_size, c.seed)
            plan = router.plan(micro) if router else None
            plans += [plan.spec] if router else []
            with autocast(device, dtype):
                loss = model(x.to(device), y.to(device), plan=plan)[1] / c.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timed_steps += 1

        done = step + 1
        if done % c.log_interval == 0 or done == c.max_iters:
            total = finite(float(total), done)
            speed = timed_steps * tokens_per_step / (time.time() - timed_since)
            row = {"step": done, "train_loss": total, "lr": lr, "tokens": done * tokens_per_step}
            log(**row, tokens_per_s=speed, time=clock(), **({"plans": plans} if router else {}))
            left = duration((c.max_iters - done) * tokens_per_step / speed)
            drawn = f"  drew {plans[-1]}" if router else ""
            text = f"step {done:5}  loss {total:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s  {left} left{drawn}"
            print(text, flush=True)
            plans = []

    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if interrupted:
        command = f"python train.py --out_dir={c.out_dir} --init_from=resume"
        print(f"stopped and saved after step {step}; go on: {command}")
        sys.exit(128 + interrupted[0])
    over = " over drawn plans" if router else ""
    bpb = bits_per_byte(best, val)
    print(f"{c.out_dir}: {duration(clock())}, best val {best:.4f} nats/token, {bpb:.4f} bits/byte{over}")


def show_sample(model: GPT, out: Path, device: str):
    """A few lines of text, uncompiled: sampling changes shapes at every step."""
    enc = data.load_tokenizer(out)
    prompt = torch.tensor([[enc.eot_token]], device=device)
    with torch.compiler.set_stance("force_eager"):
        ids = model.generate(prompt, min(64, model.config.block_size - 1), temperature=0.8, top_k=50, seed=0)
    print("  | " + enc.decode(ids[0, 1:].tolist()).replace("\n", "\n  | "), flush=True)


if __name__ == "__main__":
    run(main)
