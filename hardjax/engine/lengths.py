"""How many steps or rounds one call of the device takes: few different numbers, as each is a program to compile."""

import math

import numpy as np

# Segments of a round that something is measured in, and numbers of rounds in one call, are powers of this: 4 rather
# than 2 halves the programs to compile, and costs at most three dispatches (0.1 to 0.5 ms each) more at each size.
RUNG = 4


def power(most: int) -> int:
    """The largest power of `RUNG` up to `most`, which is at least 1."""
    # A quotient of logarithms may come out just below a whole number (1000 to the base 10 does): nudged, then cut.
    return RUNG ** int(math.log(most, RUNG) + 1e-9)


def even(length: int, cursor: int, bound: int) -> int:
    """The next segment of a round that is cut by the bound alone: equal parts where they divide it, else of two sizes
    one apart, so that a round of any length takes two programs at most."""
    fewest = -(-length // bound)
    parts = next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)
    short, longer = divmod(length, parts)
    edges = np.cumsum([short + 1] * longer + [short] * (parts - longer))
    return int(edges[np.searchsorted(edges, cursor, side="right")]) - cursor


def rung(free: int, bound: int, every: int) -> int:
    """The longest of few lengths that fits before the next measured step: the interval, or a power of `RUNG`."""
    most = min(free, bound)
    if every <= most:
        return every
    return power(most)
