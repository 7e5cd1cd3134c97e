"""Train a model: normally, for one sharing plan (--plan), or with stochastic KV routing (--router_p).

python train.py config/demo.toml --out_dir=out/normal
python train.py config/demo.toml --out_dir=out/stochastic --router_p=0.5
python train.py config/demo.toml --out_dir=out/fusedkv --plan=fusedkv
python train.py --out_dir=out/normal --init_from=resume
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import kernels
from kv_router import StochasticRouter, uniform_below
from model import GPT, GPTConfig
from support import cli, convert, devices, parallel, settings
from support.cli import UserError, setting
from support.runs import Run, Signals, model_from, window_losses

import torch
from torch import Tensor


@dataclass
class TrainConfig:
    """The settings of a run: flags of the command line, and keys of a TOML file. Raises PlanError or
    UserError for what contradicts itself."""

    out_dir: str = setting("out/run", "where checkpoints, logs and settings of this run go")
    init_from: str = setting("scratch", "scratch; resume: from out_dir; hf:FOLDER: a Hugging Face folder")
    fit_tokens: int = setting(16384, "with hf:FOLDER and a plan: tokens that it is fitted to; 0 is off")
    # the data
    dataset: str = setting("python", "a corpus below data_dir; python and shakespeare are made when missing")
    data_dir: str = setting("data", "where tokenized corpora live")
    # sharing
    plan: str = setting("full", "KV-sharing plan to build and train; python kv_router.py --help lists them")
    router_p: float = setting(
        0.0, "stochastic KV routing: chance that a layer reads what a random lower layer reads; 0 is off"
    )
    router_lowest: int = setting(0, "stochastic KV routing: lowest layer that others are routed to")
    forward_passes: int = setting(7, "cyclic plans: passes without gradient")
    backward_passes: int = setting(2, "cyclic plans: passes with gradient, after those", low=1)
    # the model
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
    optimizer: str = setting("muon", "for the layers' matrices; AdamW trains the rest", ("adamw", "muon"))
    batch_size: int = setting(16, "sequences per micro-step, on all devices together", low=1)
    gradient_accumulation_steps: int = setting(1, "micro-steps per step", low=1)
    max_iters: int = setting(600, "steps; 0 only evaluates and saves")
    learning_rate: float = setting(5e-3, "peak learning rate; for adamw 3e-3 is better")
    min_lr: float = setting(5e-4, "learning rate at the end of the cosine")
    warmup_iters: int = setting(50, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "weight decay, on matrices only")
    beta1: float = setting(0.9, "AdamW beta1", below=1)
    beta2: float = setting(0.95, "AdamW beta2", below=1)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 is off")
    seed: int = setting(0, "seed of the weights, the order of the data, and the router", below=1 << 63)
    # evaluation and logs
    eval_interval: int = setting(100, "steps between evaluations (and checkpoints)", low=1)
    eval_iters: int = setting(8, "batches of held-out windows per evaluation, always the same ones", low=1)
    log_interval: int = setting(10, "steps between log lines", low=1)
    # the machine
    device: str = setting("auto", "cpu, cuda, mps, cuda:1, ...; auto takes the fastest there is")
    dtype: str = setting(
        "auto", "of matrix products; auto: bfloat16 where it is fast", ("auto", "float32", "bfloat16")
    )
    compile: bool | None = setting(None, "torch.compile the layers; auto: where that pays within the run")
    shard: bool = setting(False, "under torchrun: split weights and moments over the devices (FSDP2)")

    def __post_init__(self):
        self.model_config(vocab_size=1)  # mistakes are named before a corpus is made
        if self.min_lr > self.learning_rate:
            raise UserError(
                f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}; lower it too"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    @property
    def corpus(self) -> Path:
        return Path(self.data_dir) / self.dataset

    def micro_steps(self, start: int, end: int) -> range:
        """The numbers of the micro-steps of steps start .. end - 1: which batch and which plan they get."""
        return range(start * self.gradient_accumulation_steps, end * self.gradient_accumulation_steps)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that these settings ask for."""
        sizes = {f.name: getattr(self, f.name) for f in fields(GPTConfig) if hasattr(self, f.name)}
        return GPTConfig(**sizes, vocab_size=vocab_size)


# What a resumed run may change; everything else must be as in the checkpoint.
FREE_ON_RESUME = set(
    "data_dir max_iters learning_rate min_lr eval_interval log_interval device dtype compile shard".split()
)


# --- optimizers -------------------------------------------------------------------------------------------


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    done = (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (c.learning_rate - c.min_lr)


MOMENTUM = 0.95  # Muon's


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024): a matrix moves along its momentum made orthogonal, scaled to the size of AdamW's
    steps (arXiv 2502.16982), so that both can share a learning rate. torch.optim.Muon computes in bfloat16
    always, which many CPUs emulate; this one in `dtype`."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One step from the gradients that are there."""
        for group in self.param_groups:
            updates = {}  # by shape: the matrices of one shape are made orthogonal together, which is faster
            for p in group["params"]:
                if p.grad is None:  # sharing: a drawn plan can leave K and V of a layer unread
                    continue
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                update = parallel.whole(p.grad.lerp(momentum, MOMENTUM))  # Nesterov's
                updates.setdefault(p.shape, []).append((p, update))
            for shape, pairs in updates.items():
                directions = orthogonal(torch.stack([update for _, update in pairs]).to(self.dtype))
                for (p, _), direction in zip(pairs, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
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
    for n, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x @ x.mT if n > 0 else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(
    model: GPT, c: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the layers. Norms, biases and fusion gates have no weight decay."""
    layers = [p for p in model.blocks.parameters() if p.dim() == 2 and c.optimizer == "muon"]
    taken = set(layers)
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in taken]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas = (c.beta1, c.beta2)
    adamw = torch.optim.AdamW(
        groups, lr=c.learning_rate, betas=betas, weight_decay=c.weight_decay, fused=True
    )
    return [adamw] + ([Muon(layers, c.learning_rate, c.weight_decay, dtype)] if layers else [])


# --- training ---------------------------------------------------------------------------------------------


def train(c: TrainConfig, model: GPT, router: StochasticRouter | None, run: Run, device: str, dtype) -> int:
    """From the run's first step to its last: look, stop, step, report. Returns the number of the signal that
    stopped it earlier, or 0."""
    context = partial(devices.autocast, device, dtype)
    optimizers = make_optimizers(model, c, dtype)
    run.restore(model, optimizers)

    def loss_on_held_out(plan=None) -> float:
        n = c.eval_iters * c.batch_size
        return float(window_losses(model, run.held_out, n, c.batch_size, plan, context).mean())

    losses: list[Tensor] = []  # and gradient norms, of the steps since the last report
    with Signals() as signals:
        for step in range(run.start, c.max_iters + 1):
            # Evaluate, on the same held-out windows and under the same drawn plans every time.
            stop = parallel.any_signal(signals.received, step % c.log_interval == 0, device)
            due = (step % c.eval_interval == 0 or step == c.max_iters) and step != run.evaluated
            goal = math.inf  # what best.pt minimizes
            if due:
                loss = goal = loss_on_held_out()
                if router:  # sharing: best.pt is the best over drawn plans; the full cache is one of them
                    goal = loss_on_held_out(router.plan)
                run.report_evaluation(step, loss, goal, step * c.tokens_per_step)
            if stop or (due and (step > 0 or c.max_iters == 0)):  # an untrained model is not saved
                run.save(step, model, optimizers, goal)
            if stop or step == c.max_iters:
                return stop

            losses.append(take_step(step, c, model, router, optimizers, run.tokens, context, device))

            # Report, also before each evaluation, so that the log is complete at every checkpoint.
            done = step + 1
            at_end = done == c.max_iters or signals.received
            if at_end or done % c.log_interval == 0 or done % c.eval_interval == 0:
                drawn = c.micro_steps(done - len(losses), done)
                plans = [router.plan(i).spec for i in drawn] if router else []
                run.report(done, losses, learning_rate(step, c), plans, c.tokens_per_step, c.max_iters - done)
                losses = []


def take_step(step: int, c, model, router, optimizers, tokens, context, device) -> Tensor:
    """One step of the optimizers, on gradient_accumulation_steps batches. Returns the loss and the norm of
    the gradient, (2,), which a GPU may still be computing."""
    total = torch.zeros((), device=device)
    for micro in c.micro_steps(step, step + 1):
        batch = tokens.batch(micro, c.batch_size, c.seed)
        x, y = (devices.to_device(t[parallel.RANK :: parallel.RANKS], device) for t in batch)
        plan = router.plan(micro) if router else None  # sharing: every batch runs under a plan of its own
        with context():
            loss = model(x, y, plan=plan)[1] / c.gradient_accumulation_steps
        loss.backward()
        total += loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # FSDP has averaged the gradients already.
    parallel.average([total] if c.shard else [total, *gradients])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack((total, parallel.whole(norm)))


def make_model(c: TrainConfig, run: Run, vocab_size: int, device: str) -> GPT:
    """The model to train: from the run's checkpoint, from a Hugging Face folder, or new."""
    if vocab_size > 1024:
        vocab_size = -(-vocab_size // 64) * 64  # GPUs want aligned rows of logits
    config = c.model_config(vocab_size)
    bytes_each = 12 if c.optimizer == "muon" else 16  # weight, gradient, and one or two moments
    devices.check_memory(lambda: GPT(config), bytes_each, device, parallel.RANKS if c.shard else 1)
    torch.manual_seed(c.seed)
    if run.checkpoint:
        return model_from(run.source, run.checkpoint)
    if c.init_from.startswith("hf:"):
        return convert.pretrained(c.init_from[3:], config, run.tokens, c.fit_tokens, device)
    return GPT(config)


def main(rule: Callable = uniform_below) -> None:
    """`rule` draws the plans of stochastic routing, see kv_router.StochasticRouter."""
    c, run = settings.start(TrainConfig, FREE_ON_RESUME, __doc__)
    router = None
    if c.router_p:
        router = StochasticRouter(c.n_layer, c.router_p, c.seed, c.plan, c.router_lowest, rule)
    device = parallel.join(devices.pick_device(c.device), c.batch_size, c.shard)
    vocab_size = run.find_corpus(c.corpus, c.block_size)
    model = make_model(c, run, vocab_size, device)
    n_params = sum(p.numel() for p in model.parameters())
    flops = 6 * n_params * c.tokens_per_step * (c.max_iters - run.start)
    compiled, why = devices.pick_compile(c.compile, device, flops)
    if compiled:
        kernels.compile_training(model)
    if c.shard:
        parallel.shard(model, device)
    model.to(device).train()
    print(f"{c.out_dir}: {n_params:,} parameters, plan {c.plan}, router_p {c.router_p:g}")
    dtype, dtype_reason = devices.pick_dtype(c.dtype, device)
    name = devices.device_name(device)
    how = "compiled" if compiled else "not compiled"
    print(f"{name}, {str(dtype).removeprefix('torch.')} ({dtype_reason}), {how} ({why})")
    print(f"steps {run.start} to {c.max_iters}, {c.tokens_per_step:,} tokens each")
    run.open(asdict(c), {"device": name, "dtype": str(dtype), "parameters": n_params})
    run.close(train(c, model, router, run, device, dtype))


if __name__ == "__main__":
    cli.run(main)
