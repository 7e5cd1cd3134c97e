"""Whether routing costs a model its induction: how well it repeats a random sequence that it has just read,
and which heads attend to the token that followed the previous occurrence."""

import numpy as np
import torch
from torch import Tensor

from kv_router import Plan
from lab.studies.cache import FLEXIBLE, KEY_RESIDUAL, NORMAL, PAPER, SHARED
from lab.studies.deploy import deployed
from lab.studies.report import OURS, Claim, Section, markdown, mean_std, percent
from lab.studies.workbench import Workbench, seeded
from model import GPT, SequenceKV
from plots import line, picture

LENGTH = 64  # tokens of a sequence, which then comes a second time
MODELS = FLEXIBLE | {"key residual": KEY_RESIDUAL}


def shares(bench: Workbench) -> tuple[float, ...]:
    return 1, 0.5, bench.shares[-2]


def sequences(bench: Workbench, run: str, n: int = 16) -> Tensor:
    """Held-out tokens in random order, so that nothing but repetition can be predicted: (n, 2 LENGTH)."""
    model, tokens = bench.load(run)
    text = next(tokens.held_out(n, n))[0][:, :LENGTH].flatten()
    shuffled = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    return shuffled.view(-1, LENGTH).repeat(1, 2).to(model.embed.weight.device)


@torch.no_grad()
def attention_weights(model: GPT, idx: Tensor, plan: Plan) -> Tensor:
    """What every query gives to every key, averaged over the sequences idx (B, T) of a plan without fusion or
    cycles: (n_layer, n_head, T, T)."""
    T, groups = idx.size(1), model.config.n_head // model.config.n_kv_head
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    kv = SequenceKV(plan)
    kv.rope = model.rope(torch.arange(T, device=idx.device))
    x, weights = model.embed(idx), []
    for i, block in enumerate(model.blocks):
        q = model.project(i, x, kv)
        ks, vs = kv.sources(i)
        scores = q @ ks[0].repeat_interleave(groups, dim=1).mT / model.config.head_dim**0.5
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1).mean(0))
        x = block(x, q, ks, vs, past_only=False)
    return torch.stack(weights)


def induction_scores(model: GPT, idx: Tensor, plan: Plan) -> Tensor:
    """How much of its attention every head gives, in the second copy, to the token that followed the current
    one in the first (Olsson et al. 2022): (n_layer, n_head)."""
    return attention_weights(model, idx, plan).diagonal(1 - LENGTH, dim1=2, dim2=3)[..., 1:].mean(-1)


def copying(bench: Workbench, run: str, spec: str) -> np.ndarray:
    """How much lower the loss is in the second copy than in the first, in nats per token, and the highest
    induction score of any head."""

    @torch.no_grad()
    def measure():
        model, _ = bench.load(run)
        idx, plan = sequences(bench, run), model.resolve(spec)
        losses = model.losses(idx[:, :-1].contiguous(), idx[:, 1:].contiguous(), plan)
        first, second = losses[:, : LENGTH - 1], losses[:, LENGTH:]
        return [first.mean() - second.mean(), induction_scores(model, idx, plan).max()]

    return bench.measured(run, f"induction {spec}", measure)


def study(bench: Workbench) -> Section:
    lengths = [bench.steps // 2, bench.steps, 4 * bench.steps]
    flags = {n: "" if n == bench.steps else f"--max_iters={n} " for n in lengths}
    runs = {(n, s): (flags[n] + s).strip() for n in lengths for s in MODELS.values()}
    bench.train(run for settings in runs.values() for run in seeded(settings))
    rows, gains = [], {}
    with picture(bench.pictures / "induction.png", columns=2) as axes:
        for i, (name, settings) in enumerate(MODELS.items()):
            for n in lengths:
                cells = []
                for share in shares(bench):
                    run = runs[n, settings]
                    found = [copying(bench, r, deployed(bench, r, share)) for r in seeded(run)]
                    found = np.array(found)  # (seeds, 2)
                    gains[n, settings, share] = found
                    cells += [f"{mean_std(found[:, 0])}; {found[:, 1].mean():.2f}"]
                rows.append([name, n, *cells])
            for ax, k in zip(axes, (0, 1)):
                line(ax, lengths, [gains[n, settings, 1][:, k].mean() for n in lengths], i, name)
        axes[0].set(xlabel="steps", ylabel="lower loss of the second copy, nats per token")
        axes[1].set(xlabel="steps", ylabel="highest induction score of a head")
    draw_heads(bench, [runs[lengths[-1], settings] for settings in MODELS.values()])
    normal, paper, shared, residual = (
        gains[lengths[-1], s, 1][:, 0] for s in (NORMAL, PAPER, SHARED, KEY_RESIDUAL)
    )
    when = f"after {lengths[-1]:,} steps"
    claims = [
        Claim(OURS, f"A normal model has more induction than a stochastic one {when}", normal - paper),
        Claim(OURS, f"Stochastic shared-v has more induction than stochastic {when}", shared - paper),
        Claim(OURS, f"Key residual has more induction than stochastic {when}", residual - paper),
    ]
    text = f"""{LENGTH} held-out tokens in random order, and the same again. How much lower is the loss of the
second copy, in nats per token; and, after the semicolon, the highest induction score of a head: the attention
that it gives in the second copy to the token that followed the current one in the first. Attention spread
evenly would give 0.01.

"""
    header = ["trained", "steps", *(f"cache {percent(share)}" for share in shares(bench))]
    text += markdown(header, rows) + "\n![induction over training](PICTURES/induction.png)\n"
    text += f"""
The head with the highest score of each model after {lengths[-1]:,} steps, under three plans: what the
positions of both copies (rows) give to earlier ones. Induction is the line {LENGTH - 1} below the diagonal.

![attention of one head](PICTURES/heads.png)
"""
    return Section(claims, text)


def draw_heads(bench: Workbench, settings: list[str]) -> None:
    with picture(bench.pictures / "heads.png", columns=3, rows=len(MODELS), width=2.4, height=2.7) as axes:
        for row, run in zip(axes, (seeded(s)[0] for s in settings)):
            model, _ = bench.load(run)
            idx = sequences(bench, run)
            best = int(induction_scores(model, idx, model.plan).argmax())
            layer, head = divmod(best, model.config.n_head)
            for ax, share in zip(row, shares(bench)):
                weights = attention_weights(model, idx, model.resolve(deployed(bench, run, share)))
                ax.imshow(
                    weights[layer, head].cpu().numpy(),
                    cmap="Greys",
                    vmin=0,
                    vmax=0.3,
                    interpolation="nearest",
                )
                ax.set_title(f"layer {layer}, head {head}, cache {percent(share)}", fontsize=9)
        for row, name in zip(axes, MODELS):
            row[0].set_ylabel(name, fontsize=8)
