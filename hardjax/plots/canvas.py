"""What all pictures are drawn on: a figure with its own off-screen canvas, whatever backend pyplot would take."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

# A loss of exactly 0 has no logarithm. float32 losses of a network that fits everything go to 1e-9 and then to 0.
_LEAST = 1e-10


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def headline(drawn: Figure | SubFigure, text: str, **style: Any) -> None:
    """A title over all axes, broken into as many lines as the width takes."""
    drawn.suptitle(text, wrap=True, **style)


def say(axes: Any, text: str) -> None:
    """Text in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


def floored(values: Any, axes: Any) -> Any:
    """What can be drawn of these values on these axes: not below the least on a logarithmic one."""
    return np.maximum(values, _LEAST) if axes.get_yscale() == "log" else values
