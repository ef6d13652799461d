"""The back-propagation budget as a plain list of dispatches: exactly E * N of them, whatever the share."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Dispatch:
    """One call of a compiled program.

    Attributes:
        first: round 0, all N batches.
        steps: back-propagations a round (static in the program).
        rounds: rounds in this call.
        max_rounds: most rounds that the program takes in one call (static).
        test: a test point follows.
    """

    first: bool
    steps: int
    rounds: int
    max_rounds: int
    test: bool


def dispatches(
    num_batches: int, round_steps: int, epochs: int, test_every: str = "epoch", steps_per_dispatch: int = 64
) -> Iterator[Dispatch]:
    """The run from round 0 to exactly epochs * num_batches back-propagations; the last round is cut short.

    A test point comes at the first round boundary at or after every num_batches back-propagations (or after every
    round), and always at the end. Full rounds of one program, one cut-short round at the end: with round 0 three
    programs at most.
    """
    total = epochs * num_batches
    most = (
        1 if test_every == "round" else max(1, min(-(-num_batches // round_steps), steps_per_dispatch // round_steps))
    )
    yield Dispatch(True, num_batches, 1, 1, True)
    done, target = num_batches, 2 * num_batches
    while done < total:
        if total - done < round_steps:
            yield Dispatch(False, total - done, 1, 1, True)
            return
        until_target = -(-(target - done) // round_steps)
        rounds = min(most, until_target, (total - done) // round_steps)
        done += rounds * round_steps
        test = done >= min(target, total) or test_every == "round"
        yield Dispatch(False, round_steps, rounds, most, test)
        while target <= done:
            target += num_batches
