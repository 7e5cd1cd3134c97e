"""Fine-tuning a normal checkpoint for sharing: its loss within every share of the cache, over the number of
tokens that it is fine-tuned on."""

from collections.abc import Iterable

import hf
from cli import human
from lab.studies.cache import NORMAL, SHARED
from lab.studies.deploy import losses_within
from lab.studies.price import FROM_0, FROM_1
from lab.studies.report import OURS, ROUTING, Claim, Section, markdown, mean_std, percent
from lab.studies.workbench import SEEDS, Workbench, seeded
from plots import line, picture

# Of 5e-4, 2e-3 and 5e-3 those with which the model of seed 0 got furthest in 100 steps of stochastic routing
# (p = 0.5) and of stochastic shared-v. Layers that lose their own V have more to learn.
GENTLE = "--learning_rate=5e-4 --min_lr=5e-5"
STEEP = "--learning_rate=2e-3 --min_lr=2e-4"
KINDS = {  # all routing has p = 0.3
    "not routed": GENTLE,
    "stochastic": f"{GENTLE} {FROM_0}",
    "stochastic, layer 0 never drawn": f"{GENTLE} {FROM_1}",
    "stochastic shared-v": f"{STEEP} {SHARED}",
}
PICTURED = (1, 0.5, 0.25)  # shares of the cache


def tuned(bench: Workbench, settings: str, steps: int) -> list[str]:
    """The runs that start from the normal model of each seed. The data comes in another order than before."""
    recipe = f"--max_iters={steps} --warmup_iters={steps // 8} {settings}"
    bases = seeded(NORMAL)
    return [
        f"--init_from=hf:{bench.path(base) / 'folder'} {recipe} --seed={SEEDS + i}"
        for i, base in enumerate(bases)
    ]


def export(bench: Workbench, runs: Iterable[str]) -> None:
    """Write runs as Hugging Face folders, which is what train.py can start from."""
    for run in runs:
        folder = bench.path(run) / "folder"
        if not (folder / "config.json").exists():
            hf.save_hf(bench.load(run)[0], folder)


def study(bench: Workbench) -> Section:
    bases = seeded(NORMAL)
    lengths = (bench.steps // 12, bench.steps // 4, bench.steps // 2)
    bench.train(bases)
    export(bench, bases)
    runs = {(kind, n): tuned(bench, settings, n) for kind, settings in KINDS.items() for n in lengths}
    bench.train(run for group in runs.values() for run in group)

    before = {share: losses_within(bench, bases, share) for share in bench.shares}
    losses = {
        share: {key: losses_within(bench, group, share) for key, group in runs.items()}
        for share in bench.shares
    }
    n_tokens = {n: bench.log(runs["not routed", n][0], "tokens")[1][-1] for n in lengths}
    rows = [["before", "", *(mean_std(before[share]) for share in bench.shares)]]
    for kind, n in runs:
        rows.append([kind, human(n_tokens[n]), *(mean_std(losses[share][kind, n]) for share in bench.shares)])
    with picture(bench.pictures / "finetune.png", columns=len(PICTURED), sharey=True) as axes:
        for ax, share in zip(axes, PICTURED):
            for i, kind in enumerate(KINDS):
                values = [before[share], *(losses[share][kind, n] for n in lengths)]
                line(ax, [0, *n_tokens.values()], [x.mean() for x in values], i, kind)
            ax.set(title=f"cache {percent(share)}", xlabel="tokens of fine-tuning")
        axes[0].set_ylabel("held-out loss, nats per token")

    claims = []
    for n in lengths:
        claims += claims_after(n, losses, f"after {human(n_tokens[n])} tokens of fine-tuning")
    text = """The normal models of every seed, fine-tuned with p = 0.3 on text of the same corpus in another
order. Each is deployed as suits it best within a share of the cache, before and after: see
`lab/studies/deploy.py`. The learning rate, with shared-v four times the others', was chosen on seed 0. Models
whose layer 0 is never drawn must keep both layers 0 and 1.

"""
    header = ["fine-tuned", "tokens", *(f"cache {percent(share)}" for share in bench.shares)]
    text += markdown(header, rows) + "\n![loss over tokens of fine-tuning](PICTURES/finetune.png)\n"
    return Section(claims, text)


def claims_after(n: int, losses: dict, when: str) -> list[Claim]:
    """What is claimed of fine-tuning for n steps."""
    full, quarter = ([losses[share][kind, n] for kind in KINDS] for share in (1, 0.25))
    control, routed, layer_0_out, _ = full
    quarter_control, quarter_routed, _, quarter_shared = quarter
    found = [
        (ROUTING, "Routing helps with a quarter of the cache", quarter_control - quarter_routed),
        (OURS, "Routing costs loss at the full cache", routed - control),
        (OURS, "Not drawing layer 0 makes that cost smaller", routed - layer_0_out),
        (OURS, "Stochastic shared-v helps a quarter more than routing", quarter_routed - quarter_shared),
    ]
    return [Claim(source, f"{text} {when}", effect) for source, text, effect in found]
