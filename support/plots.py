"""One style for all pictures: lines differ by marker and dash as well as by colour, so that a grey print
reads."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.cli import replace_file

STYLES = [
    ("o", "-", "#1b5e9b"),
    ("s", "--", "#d1601f"),
    ("D", "-.", "#2b8a4b"),
    ("^", ":", "#7b3fa0"),
    ("v", (0, (5, 1)), "#8c6d1f"),
    ("P", (0, (3, 1, 1, 1)), "#b0305c"),
    ("X", (0, (1, 1)), "#444444"),
]


@contextmanager
def picture(path: Path, columns: int = 1, rows: int = 1, width: float = 4.5, height: float = 3.8, **options):
    """Axes to draw on, one or an array of them; the picture is written at the end, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a `$` in the name of a run is only that

    # In inches, so that all pictures have letters of one size.
    fig, axes = plt.subplots(rows, columns, figsize=(1 + width * columns, height * rows), dpi=130, **options)
    try:
        yield axes
        for ax in fig.axes:
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize=8)
        fig.tight_layout()
        # Drawn in memory, and written like every other file.
        content = io.BytesIO()
        fig.savefig(content, format="png")
    finally:
        plt.close(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getbuffer())


def style(i: int) -> tuple[str, object, str]:
    """The i-th marker, dash and colour; after seven come the same markers in other colours."""
    marker, dash, _ = STYLES[i % len(STYLES)]
    return marker, dash, STYLES[(i + i // len(STYLES)) % len(STYLES)][2]


def line(ax, x: Sequence, y: Sequence, i: int, label: str, markers: bool = True) -> None:
    """The i-th line of a picture."""
    marker, dash, colour = style(i)
    label = " " * label.startswith("_") + label  # matplotlib leaves names that begin so out of legends
    ax.plot(x, y, marker=marker if markers else None, linestyle=dash, color=colour, label=label, markersize=5)
    ax.grid(alpha=0.25)


def label_percentages(ax, shares: Iterator[float] | Sequence[float], full: float = 1.0) -> None:
    """Name points of a horizontal axis by their share of the full cache, whose size is `full`."""
    labels = [f"{100 * share:.3g}%" for share in shares]
    ax.set_xticks([full * share for share in shares], labels, fontsize=8)
