"""The models of the first study, trained for longer and twice as wide."""

from lab.studies.cache import by_share, claims, describe, draw, table, train_models
from lab.studies.report import Section, series
from lab.studies.workbench import Workbench
from plots import picture


def study(bench: Workbench) -> Section:
    sizes = ["", f"--max_iters={4 * bench.steps}", bench.wide]
    train_models(bench, sizes)
    found, text, costs = [], "", []
    with picture(bench.pictures / "scale.png", columns=len(sizes), width=4) as axes:
        for ax, size in zip(axes, sizes):
            losses, title = by_share(bench, size), describe(bench, size)
            draw(ax, losses, title)
            cost = (losses["key residual"][1] - losses["shared-v, not routed"][1]).mean()
            costs.append(f"{cost:.3f} ({title})")
            if size:  # the first study has the claims and the table of the others
                found += claims(bench, losses, f" ({title})")
                text += f"{title}:\n\n{table(losses)}\n"
        axes[0].set_ylabel("held-out loss, nats per token")
    summary = f"""Where all its cache is kept, `key residual`, one checkpoint for many sizes, is above
shared-v without routing by {series(costs)}."""
    return Section(found, text + "![loss against cache](PICTURES/scale.png)\n", summary)
