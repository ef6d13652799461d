"""A curve as a line of text."""

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48


def curve(values: Sequence[float], *, log: bool = False, width: int = _WIDTH) -> str:
    """A letter a point, or a letter for the mean of several neighbours where there are more than `width`.

    Args:
        values: in order; those that are not finite are shown as x.
        log: heights by the logarithm, where all finite values are above 0.
        width: most letters.
    """
    heights = _thinned(values, width)
    finite = [height for height in heights if math.isfinite(height)]
    if log and finite and min(finite) > 0:
        heights = [math.log(height) if math.isfinite(height) else height for height in heights]
        finite = [math.log(height) for height in finite]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_block(height, low, high) for height in heights)


def _thinned(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours; one that is not finite makes its mean so."""
    if len(values) <= width:
        return list(values)
    edges = [place * len(values) // width for place in range(width + 1)]
    groups = [values[first:last] for first, last in itertools.pairwise(edges)]
    return [math.fsum(group) / len(group) if all(map(math.isfinite, group)) else math.nan for group in groups]


def _block(height: float, low: float, high: float) -> str:
    if not math.isfinite(height):
        return "x"
    if high <= low:
        return BLOCKS[len(BLOCKS) // 2]
    # Halved first: the distance of the largest floats is beyond them.
    share = (height / 2 - low / 2) / (high / 2 - low / 2)
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]
