"""Which samples a run trained most often: the first thing to look at when labels are in doubt."""

import jax.numpy as jnp
import numpy as np

from hardjax.choose.losses import CROSS_ENTROPY
from hardjax.engine.state import TrainState
from hardjax.training.run import RunResult
from hardjax.training.setting import Setting

_CHUNK = 500


def hardest_samples(
    setting: Setting, result: RunResult, count: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The `count` training samples trained most often, ties by their loss under the final model.

    Where every epoch draws its batches anew, all samples are visited alike but for those that happen to fill up a last
    batch; there the samples that trimming kept most often, of their visits, are taken instead.

    Returns:
        (k,) arrays: sample indices, times trained, losses, predicted classes, k = min(count, n); None for the last
        where samples have no classes.
    """
    replays = sample_counts(result.state)
    # Where batches are kept, how often a sample was visited is what the strategy said of it; where they are drawn anew,
    # a run that was interrupted in its first epoch has not visited all samples.
    visits = np.maximum(np.asarray(result.state.seen), 1) if result.config.selection.redraws else 1
    rank = replays / visits
    # With all that tie with the last one: their losses decide which are shown, not their places in the data set.
    candidates = np.flatnonzero(rank >= np.sort(rank)[-min(count, len(rank))])
    train, stored = setting.splits["train"], setting.dataset.train
    labels = np.asarray(train.labels[candidates])
    logits = np.concatenate(
        [
            np.asarray(
                setting.programs.predict(result.state.variables, stored.take(chunk), train.mean, train.std), np.float64
            )
            for chunk in np.split(candidates, range(_CHUNK, len(candidates), _CHUNK))
        ]
    )
    loss = setting.recipe.loss
    classified = labels.ndim == 1 and loss.counts(logits, labels)
    if loss.name == CROSS_ENTROPY and classified:
        # In float64: float32 losses of samples that are fitted to the end are all 0, and could not be ordered.
        top = logits.max(-1)
        losses = np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(len(labels)), labels]
    else:
        losses = np.asarray(loss(jnp.asarray(logits, jnp.float32), train.labels[candidates]), np.float64)
    order = np.lexsort((-losses, -rank[candidates]))[:count]
    chosen = candidates[order]
    return chosen, replays[chosen], losses[order], logits.argmax(-1)[order] if classified else None


def sample_counts(state: TrainState) -> np.ndarray:
    """(n,) times each training sample was trained: its visits, the fillers of last batches among them, less the times
    that trimming dropped it. Both are counted where they happen, by the same rule."""
    return np.asarray(state.seen) - np.asarray(state.drops)
