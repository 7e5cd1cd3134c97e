"""The demo's models, trained for longer."""

import numpy as np

from cli import human
from lab.studies.cache import FLEXIBLE, NORMAL, PAPER, SHARED
from lab.studies.deploy import losses_within
from lab.studies.report import Claim, Section, markdown, percent, spread
from lab.studies.workbench import Workbench, seeded
from plots import label_percentages, line, picture

FUSED = "--plan=fusedkv"


def by_share(bench: Workbench, settings: str) -> dict[float, np.ndarray]:
    """The losses of a model, one per seed, within every share of the cache."""
    if settings.endswith(FUSED):
        return {0.5: bench.losses(settings)}
    return {share: losses_within(bench, settings, share) for share in bench.shares}


def study(bench: Workbench) -> Section:
    return compare(bench, ["", f"--max_iters={4 * bench.steps}"], "scale.png")


def compare(bench: Workbench, sizes: list[str], file: str) -> Section:
    """Losses by share of the cache, in one panel of the picture for each of `sizes`, settings that all models
    there have."""
    models = FLEXIBLE | {"FusedKV": FUSED}
    bench.train(run for size in sizes for s in models.values() for run in seeded(f"{size} {s}".strip()))
    claims, text = [], ""
    with picture(bench.pictures / file, columns=len(sizes), squeeze=False) as axes:
        for ax, size in zip(axes[0], sizes):
            losses = {s: by_share(bench, f"{size} {s}".strip()) for s in models.values()}
            run = seeded(f"{size} {NORMAL}".strip())[0]
            n_parameters = sum(p.numel() for p in bench.load(run)[0].parameters())
            n_tokens = bench.log(run, "tokens")[1][-1]
            title = f"{human(n_parameters)} parameters, {human(n_tokens)} tokens"
            for i, (name, settings) in enumerate(models.items()):
                shares, values = list(losses[settings]), list(losses[settings].values())
                line(ax, shares, [x.mean() for x in values], i, name)
                ax.errorbar(
                    shares, [x.mean() for x in values], [x.std(ddof=1) for x in values], ls="", color="grey"
                )
            label_percentages(ax, (1 / bench.n_layer, 0.25, 0.5, 0.75, 1))
            ax.set(title=title, xlabel="KV cache, at most this share of a full one")
            rows = [
                [name, *(spread(losses[s][share]) if share in losses[s] else "" for share in bench.shares)]
                for name, s in models.items()
            ]
            text += f"\n{title}:\n\n" + markdown(["loss at a cache of", *map(percent, bench.shares)], rows)
            normal = losses[NORMAL][1]
            claims.append(
                Claim(f"The paper's rule has a price at the full cache ({title})", losses[PAPER][1] - normal)
            )
            for share in (0.5, bench.shares[-2]):
                with_less = f"With {percent(share)} of the cache, V of layer 0, its K never drawn,"
                better = f"{with_less} beats a normal full one"
                claims.append(Claim(f"{better} ({title})", normal - losses[SHARED][share]))
        axes[0, 0].set_ylabel("held-out loss, nats per token")
    return Section(claims, text + f"\n![loss against cache](PICTURES/{file})\n")
