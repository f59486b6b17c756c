"""Plots of a benchmark's results, drawn without a screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def plot(path: Path, size: tuple[float, float], title: str) -> Iterator[Axes]:
    """Axes to draw on; the file is written behind that, with a title and a legend."""
    import matplotlib as mpl  # here: only a plot needs it, and its import takes a second

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(
    path: Path,
    labels: Sequence[str],
    ratios: Mapping[str, Sequence[float]],
    *,
    quantity: str,
    title: str,
) -> None:
    """Write a plot of times over those of the native modules, on a logarithmic axis.

    Args:
        path: of the file.
        labels: one for each row.
        ratios: by peer, one for each row: a bar that begins at 1.
        quantity: what the ratios are, below the axis.
        title: above the plot.
    """
    height = 0.8 / len(ratios)
    with plot(path, (10, 0.3 * len(labels) + 1.5), title) as axes:
        for place, (peer, each) in enumerate(ratios.items()):
            offset = (place - (len(ratios) - 1) / 2) * height
            rows = [row + offset for row in range(len(labels))]
            axes.barh(rows, [ratio - 1 for ratio in each], left=1, height=height, label=peer)
        axes.axvline(1.0, color="black", linewidth=1, label="native = 1")
        axes.set_xscale("log")
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel(f"{quantity} relative to the native module (less is faster)")
