"""Train a model: normally, for one sharing plan (--plan), or with stochastic KV routing (--router_p).

python train.py config/demo.toml --out_dir=out/normal
python train.py config/demo.toml --out_dir=out/stochastic --router_p=0.5
python train.py config/demo.toml --out_dir=out/fusedkv --plan=fusedkv
python train.py --out_dir=out/normal --init_from=resume
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import cli
import data
import hf
import kernels
import parallel
from cli import Pace, UserError, duration, first_line, human, replace_file
from costs import costs
from devices import (
    autocast,
    device_memory,
    device_name,
    matmul_peak,
    pick_compile,
    pick_device,
    pick_dtype,
    to_device,
)
from kv_router import Plan, Rule, StochasticRouter, uniform_below
from model import GPT
from runs import Run, Signals, model_from, window_losses
from settings import TrainConfig, settings

# --- optimizers -------------------------------------------------------------------------------------------


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    done = (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * min(done, 1))) * (c.learning_rate - c.min_lr)


MOMENTUM = 0.95  # Muon's


class Muon(torch.optim.AdamW):
    """Muon (Jordan, 2024) for parameter groups with `muon`, AdamW for the others. A matrix moves along its
    momentum made orthogonal, scaled to the size of AdamW's steps (arXiv 2502.16982), so that both can share
    a learning rate. torch.optim.Muon takes each matrix on its own, and always in bfloat16, which many CPUs
    emulate; here those of one shape go together, and their products are in `dtype`."""

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options):
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group)
        super().step()

    def muon_step(self, group: dict) -> None:
        matrices = [p for p in group["params"] if p.grad is not None]
        if not matrices:
            return
        for p in matrices:
            if not self.state[p]:  # AdamW.load_state_dict expects a `step` in every parameter's state
                self.state[p] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
        gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_mul(gradients, 1 - MOMENTUM)  # Nesterov's
        torch._foreach_add_(updates, momenta, alpha=MOMENTUM)
        by_shape = {}  # matrices of one shape are made orthogonal together
        for p, update in zip(matrices, updates):
            update = update.full_tensor() if isinstance(update, DTensor) else update
            by_shape.setdefault(p.shape, []).append((p, update))
            p.grad = None  # so that AdamW passes it by
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shape, pairs in by_shape.items():
            directions = orthogonal(torch.stack([update for _, update in pairs]).to(self.dtype))
            for (p, _), direction in zip(pairs, directions):
                direction = parallel.like(direction.to(p.dtype), p)
                p.add_(direction, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


# Coefficients of three polynomials a x + b x^3 + c x^5, applied in turn: the first takes singular values from
# [0.01, 1] to 1 +- 0.92, the second to 1 +- 0.71, the third to 1 +- 0.27. Each is the minimax choice for what
# it is given (after arXiv 2505.16932).
POLYNOMIALS = ((8.0914, -23.6111, 17.4378), (3.6362, -2.7213, 0.5364), (2.6615, -1.9773, 0.4526))


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of x, (n, a, b): an odd polynomial of a matrix acts on its singular
    values alone."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    gram = x @ x.mT  # (n, a, a)
    # The norm of the Gram matrix bounds the largest squared singular value, more tightly than that of x does.
    size = 1.02 * gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-14)
    x, gram = x / size.sqrt(), gram / size
    for i, (a, b, c) in enumerate(POLYNOMIALS):
        if i > 0:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizer(model: GPT, c: TrainConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the layers. Matrices have weight decay; norms, biases and fusion
    gates have none."""
    inside = {p for p in model.blocks.parameters() if p.dim() == 2}
    layers = [p for p in model.parameters() if p in inside]
    tables = [p for p in model.parameters() if p.dim() == 2 and p not in inside]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": layers, "weight_decay": c.weight_decay, "muon": c.optimizer == "muon"},
        {"params": tables, "weight_decay": c.weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    options = {"lr": c.learning_rate, "betas": (c.beta1, c.beta2), "fused": True}
    return Muon(groups, dtype, **options) if c.optimizer == "muon" else torch.optim.AdamW(groups, **options)


def restore(optimizer: torch.optim.Optimizer, checkpoint: dict, path: Path) -> None:
    """Load the optimizer's moments. Its settings are those of the run, whatever the file says."""
    parameters = [(p, group["muon"]) for group in optimizer.param_groups for p in group["params"]]
    try:
        state = {}
        for i, moments in checkpoint["optimizer"]["state"].items():
            p, muon = parameters[i]
            names = ["momentum"] if muon else ["exp_avg", "exp_avg_sq"]
            wanted = {"step": torch.Size(())} | dict.fromkeys(names, p.shape)
            if {name: t.shape for name, t in moments.items()} != wanted:
                raise ValueError("its moments are not those of these weights")
            state[i] = moments | {name: parallel.like(moments[name], p) for name in names}
        if bool(state) != bool(checkpoint["step"]):  # only an untrained model has no moments
            raise ValueError("it has no moments")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except Exception as e:  # whatever a file can hold in place of tensors
        raise UserError(f"{path} does not hold the state of this optimizer ({first_line(e)})") from e


# --- training ---------------------------------------------------------------------------------------------


class Trainer:
    """A model in training: what a step does, what is looked at in between, and what is saved."""

    def __init__(self, c: TrainConfig, model: GPT, router: StochasticRouter | None, run: Run, device: str):
        self.c, self.model, self.router, self.run, self.device = c, model, router, run, device
        self.dtype, self.dtype_reason = pick_dtype(c.dtype, device)
        self.folder = Path(c.data_dir) / c.dataset
        self.train_tokens, self.val_tokens = (
            data.Tokens(self.folder, split, c.block_size) for split in ("train", "val")
        )
        self.optimizer = make_optimizer(model, c, self.dtype)
        self.context = partial(autocast, device, self.dtype)
        self.flops_per_token = costs(model.plan, model.config, c.block_size).train_flops / c.block_size
        self.peak_flops = matmul_peak(device, self.dtype) * parallel.RANKS
        self.unchecked: list[Tensor] = []  # loss and gradient norm of steps that no one has looked at yet
        self.pace, self.paused = Pace(), 0.0  # seconds spent on evaluating and saving

    def loop(self) -> tuple[int, int] | None:
        """Train from the run's step to the last. Returns the step and the signal that stopped it earlier."""
        c = self.c
        self.pace.mark(time.monotonic(), self.run.start)
        with Signals() as signals:
            for step in range(self.run.start, c.max_iters + 1):
                stopping = self.any_signal(signals, step)
                self.look(step, stopping)
                if stopping:
                    return step, signals.received or signal.SIGTERM  # another rank received it
                if step < c.max_iters:
                    self.train_step(step)
                    if (step + 1) % c.log_interval == 0 or step + 1 == c.max_iters or signals.received:
                        self.report(step + 1)

    def train_step(self, step: int) -> None:
        """One step of the optimizer, on gradient_accumulation_steps batches. A router draws each a plan."""
        c = self.c
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        total = 0.0
        for micro in c.micro_steps(step, step + 1):
            batch = self.train_tokens.batch(micro, c.batch_size, c.seed)
            x, y = (to_device(t[parallel.RANK :: parallel.RANKS], self.device) for t in batch)
            plan = self.router.plan(micro) if self.router else None
            with self.context():
                loss = self.model(x, y, plan=plan)[1] / c.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if parallel.RANKS > 1 and not c.shard:
            parallel.average_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # On a GPU these are still being computed; they are looked at when a line is due, all at once.
        self.unchecked.append(torch.stack((parallel.average(total), norm)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def any_signal(self, signals: Signals, step: int) -> bool:
        """Whether a signal asks to stop before `step`. All ranks must stop at the same step, and asking them
        waits for their devices, so several ranks ask only now and then."""
        if parallel.RANKS == 1:
            return signals.received is not None
        if step % self.c.log_interval:
            return False
        return parallel.on_any_rank(signals.received is not None, self.device)

    def look(self, step: int, stopping: bool) -> None:
        """Evaluate, save and sample, where that is due before `step`."""
        c, run = self.c, self.run
        known = run.resumed and step == run.start  # evaluated and saved by the sitting before
        due = (step % c.eval_interval == 0 or step == c.max_iters) and not known
        show = c.sample_interval and step > run.start and step % c.sample_interval == 0
        if not (due or stopping or show):
            return
        self.check(step)  # waits for a GPU: from here on, nothing is training
        began = time.monotonic()
        is_best = due and self.evaluate(step)
        if stopping or (due and (step > 0 or c.max_iters == 0)):
            self.save(step, is_best)
        if show:
            self.show_sample()
        self.paused += time.monotonic() - began

    def evaluate(self, step: int) -> bool:
        """Log the loss on held-out windows. Returns whether it is the lowest so far."""
        loss = goal = self.held_out_loss(step)
        row = {"val_loss": loss, "val_bpb": self.val_tokens.bits_per_byte(loss)}
        note = ""
        if self.router:  # the full cache is only one of the plans it trains: the best step is best over draws
            # The same draws at every evaluation, by the rule as it is at this step.
            draw = partial(self.router.plan, self.c.micro_steps(step, step + 1)[0])
            goal = row["val_loss_routed"] = self.held_out_loss(step, draw)
            note = f"  {goal:.4f} over drawn plans"
        print(f"step {step:5}  val {loss:.4f} nats/token  {row['val_bpb']:.4f} bits/byte{note}", flush=True)
        self.run.log(step, **row, tokens=step * self.c.tokens_per_step)
        if step == 0 and self.c.max_iters > 0:
            return False  # nothing is saved of an untrained model
        is_best = goal < self.run.best
        self.run.best = min(goal, self.run.best)
        return is_best

    def held_out_loss(self, step: int, plan: Callable[[int], Plan] | None = None) -> float:
        n = self.c.eval_iters * self.c.batch_size
        losses = window_losses(self.model, self.val_tokens, n, self.c.batch_size, plan, self.context)
        loss = float(losses.mean())
        if not math.isfinite(loss):
            self.run.fail(f"the loss became {loss} by step {step}", "lower --learning_rate")
        return loss

    def save(self, step: int, is_best: bool) -> None:
        state = parallel.whole({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        about = {"config": asdict(self.c), "model_config": asdict(self.model.config)}
        about["corpus"] = self.train_tokens.meta["train"]["sha256"]
        self.run.save(step, state | about, is_best)

    def check(self, step: int) -> None:
        """Stop the run at the first loss or gradient that is not finite, before anything of it is saved."""
        values = torch.stack(self.unchecked).tolist() if self.unchecked else []
        self.unchecked.clear()
        for n, pair in enumerate(values, step - len(values) + 1):
            for name, value in zip(("loss", "gradient norm"), pair):
                if not math.isfinite(value):
                    drawn = self.drawn(n - 1, n) or [self.model.plan.spec]
                    what = f"the {name} became {value} by step {n}; plan: {', '.join(drawn)}"
                    self.run.fail(what, "lower --learning_rate")

    def drawn(self, start: int, end: int) -> list[str]:
        """The plans that were drawn for steps start .. end - 1."""
        micro_steps = self.c.micro_steps(start, end) if self.router else ()
        return [self.router.plan(micro).spec for micro in micro_steps]

    def report(self, step: int) -> None:
        """A line on the screen and in the log: the loss of the last step, and how fast training goes."""
        c = self.c
        loss = float(self.unchecked[-1][0])  # waits for a GPU
        self.check(step)
        self.pace.mark(time.monotonic() - self.paused, step)
        speed = self.pace.rate * c.tokens_per_step
        row = {"train_loss": loss, "lr": learning_rate(step - 1, c), "tokens": step * c.tokens_per_step}
        row |= {"tokens_per_s": speed, "flops_per_s": speed * self.flops_per_token}
        text = f"step {step:5}  loss {loss:.4f}  lr {row['lr']:.1e}  {speed:,.0f} tokens/s"
        text += f" ({row['flops_per_s'] / self.peak_flops:.0%} of peak)"
        if speed:  # 0 where the clock has not moved
            text += f"  {duration((c.max_iters - step) * c.tokens_per_step / speed)} left"
        if plans := self.drawn(self.run.logged, step):
            row["plans"] = plans
            text += f"  drew {plans[-1]}"
        self.run.log(step, **row)
        print(text, flush=True)

    def show_sample(self) -> None:
        """A few lines of text, uncompiled: sampling changes shapes at every step."""
        enc = data.load_tokenizer(self.folder)
        prompt = torch.tensor([[enc.eot_token]], device=self.device)
        n = min(64, self.model.config.block_size - 1)
        with torch.compiler.set_stance("force_eager"):
            ids = self.model.generate(prompt, n, 0.8, top_k=50, seed=0, n_vocab=enc.n_vocab)[0, 1:]
        stream = data.TextStream(enc)
        text = "".join(map(stream, ids.tolist())) + stream.rest()
        print("  | " + text.replace("\n", "\n  | "), flush=True)


def check_memory(c: TrainConfig, device: str) -> None:
    """UserError where the weights, gradients and moments of the layers exceed the device's memory."""
    n_params = costs(Plan.parse(c.plan, c.n_layer), c.model_config(vocab_size=1)).params
    n_bytes = 12 if c.optimizer == "muon" else 16  # AdamW has two moments, Muon one
    need, have = n_bytes * n_params, device_memory(device) * (parallel.RANKS if c.shard else 1)
    if need > have:
        raise UserError(
            f"{human(n_params)} parameters need {human(need, 'B')} to train and {device} has "
            f"{human(have, 'B')}; lower --n_layer or --n_embd"
        )


def corpus_of(c: TrainConfig, checkpoint: dict | None) -> dict:
    """The meta data of the corpus, which is made where it is missing. UserError where it is not intact, or
    not the one that the checkpoint was trained on."""
    folder = Path(c.data_dir) / c.dataset
    if parallel.RANK == 0 and not folder.exists() and not checkpoint:
        data.prepare_dataset(c.dataset, folder)
    parallel.wait_for_all()
    corpus = data.verified(folder)
    if checkpoint and checkpoint["corpus"] != corpus["train"]["sha256"]:
        raise UserError(
            f"{folder} is not the corpus that {c.out_dir} was trained on; use that or a new --out_dir"
        )
    return corpus


def make_model(c: TrainConfig, vocab_size: int, path: Path | None, checkpoint: dict | None, kind: type[GPT]):
    """The model to train: from a checkpoint, from a Hugging Face folder, or new."""
    torch.manual_seed(c.seed)
    if checkpoint:
        return model_from(path, checkpoint, kind)
    if c.init_from.startswith("hf:"):
        if kind is not GPT:
            raise UserError(f"--init_from={c.init_from} makes a GPT, not a {kind.__name__}; leave it out")
        model = hf.pretrained(c.init_from[3:], c.plan, Path(c.data_dir) / c.dataset, c.block_size)
        model.config.forward_passes, model.config.backward_passes = c.forward_passes, c.backward_passes
        model.config.router_lowest = c.router_lowest
        return model
    if vocab_size > 1024:
        vocab_size = -(-vocab_size // 64) * 64  # rows of the logits that are aligned, as GPUs want them
    return kind(c.model_config(vocab_size))


def main(rule: Rule = uniform_below, model_class: type[GPT] = GPT) -> None:
    """`rule` draws the plans of stochastic routing. A study passes a rule of its own, or another class of
    model."""
    if parallel.RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    c, path, checkpoint = settings(__doc__)
    device = parallel.join(pick_device(c.device))
    if c.router_lowest:
        rule = partial(rule, lowest=c.router_lowest)
    router = StochasticRouter(c.n_layer, c.router_p, c.seed, c.plan, rule) if c.router_p else None
    check_memory(c, device)  # mistakes are named before a corpus is made
    corpus = corpus_of(c, checkpoint)
    if checkpoint and checkpoint["step"] >= c.max_iters:
        if path.name == "best.pt" and parallel.RANK == 0:  # killed before the last step was in ckpt.pt, too
            replace_file(path.with_name("ckpt.pt"), path.read_bytes())
        print(f"{c.out_dir}: all {checkpoint['step']} steps are done; more: --max_iters")
        parallel.leave()
        return
    model = make_model(c, corpus["vocab_size"], path, checkpoint, model_class)
    n_params = sum(p.numel() for p in model.parameters())
    flops = costs(model.plan, model.config, c.block_size).train_flops / c.block_size * c.tokens_per_step
    compiled, why = pick_compile(c.compile, device, flops * c.max_iters)
    if compiled:
        kernels.compile_training(model)
    if c.shard:
        parallel.shard(model, device)
    run = Run(c.out_dir, path, checkpoint, writes=parallel.RANK == 0)
    trainer = Trainer(c, model.to(device).train(), router, run, device)
    if checkpoint:
        restore(trainer.optimizer, checkpoint, path)

    run.open(asdict(c), {
        "device": device_name(device), "threads": torch.get_num_threads(), "dtype": str(trainer.dtype),
        "parameters": n_params, "plan": model.plan.spec, "corpus": corpus["train"]["sha256"],
        "ranks": parallel.RANKS, "matmul_flops_per_s": trainer.peak_flops / parallel.RANKS,
    }, trainer.folder)  # fmt: skip
    how = f"plan {c.plan}"
    if c.key_residual:
        how += f", keys of layer {c.router_lowest} added to those above"
    if router:
        drawn = f" among layers {c.router_lowest} and above" if c.router_lowest else ""
        how += f", stochastic routing with p = {c.router_p}{drawn}"
    print(f"{c.out_dir}: {n_params:,} parameters, {how}, {c.max_iters} steps of {c.tokens_per_step:,} tokens")
    dtype = str(trainer.dtype).removeprefix("torch.")
    compiling = f"{'compiled' if compiled else 'not compiled'} ({why})"
    print(f"{device_name(device)}, {dtype} ({trainer.dtype_reason}), {compiling}")
    if checkpoint:
        print(f"resumed after step {run.start}, from {path}")
    stopped = trainer.loop()
    if stopped:
        step, number = stopped
        command = f"python train.py --out_dir={c.out_dir} --init_from=resume"
        print(f"stopped and saved after step {step}; go on: {command}")
        parallel.leave(128 + number)
        sys.exit(128 + number)
    over = " over drawn plans" if router else ""
    best = f"best val {run.best:.4f} nats/token, {trainer.val_tokens.bits_per_byte(run.best):.4f} bits/byte"
    print(f"{c.out_dir}: {duration(run.seconds)}, {best}{over}")
    print(f"next: python sweep.py --out_dir {c.out_dir}; python sample.py --out_dir {c.out_dir}")
    parallel.leave()


if __name__ == "__main__":
    cli.run(main)
