"""Slow, obvious forms of what the library does fast."""

import numpy as np


def simulate_rounds(losses_of, num_batches: int, delta: float, epochs: int) -> list[list[int]]:
    """P1's Algorithm 2 in plain Python: the batches of each round, given `losses_of(step, batch) -> loss`."""
    table = [0.0] * num_batches
    rounds, step, budget = [], 0, epochs * num_batches
    chosen = list(range(num_batches))
    while True:
        trained = []
        for batch in chosen:
            if step == budget:
                break
            loss = losses_of(step, batch)
            if np.isfinite(loss):
                table[batch] = loss
            trained.append(batch)
            step += 1
        rounds.append(trained)
        if step == budget:
            return rounds
        # Descending; sorted() is stable, so equal losses keep the order of their slots.
        chosen = sorted(range(num_batches), key=lambda batch: -table[batch])[: max(1, round(delta * num_batches))]
