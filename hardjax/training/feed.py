"""Images that are not on the device, read by threads in the order of the round under way, ahead of the training.

The samples of a round are known when it has been planned, and not before: losses of the last round may decide them.
Between two rounds the device therefore waits for the first batch to be read; within one it does not, as long as reading
is the faster of the two.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax import Array

from hardjax.data import Split
from hardjax.data.augment import resolve, where_read
from hardjax.engine import devices, evaluate
from hardjax.engine.evaluate import Evaluation
from hardjax.engine.plan import Dispatch
from hardjax.engine.state import TrainData, TrainState
from hardjax.training.setting import Setting

_SHARE = 32  # images that a thread reads at a time
_AHEAD_BYTES = 1 << 28  # of images that were read and not asked for yet
_GLANCE = 1e-3  # seconds between two looks at whether the device still has work
_DRAWS = 0x5C415E  # sets the draws of crops apart from others of the same seed


def evaluated(setting: Setting, variables: Any, name: str, feed: "Feed | None") -> Evaluation:
    """Loss and accuracy over a whole split, wherever its images are."""
    if feed is not None:
        return feed.evaluate(variables, name)
    return setting.programs.evaluate(setting.performance.eval_batch_size, variables, setting.splits[name])


class _Idle:
    """How long the device has had nothing to do: from when an array that it was to compute is there."""

    def __init__(self, due: Array) -> None:
        self._due, self._since = due, 0.0
        self.look()

    def look(self) -> None:
        if not self._since and self._due.is_ready():
            self._since = time.perf_counter()

    def seconds(self) -> float:
        self.look()
        return time.perf_counter() - self._since if self._since else 0.0


class Feed:
    """The reader of one run; leaving the block ends its threads.

    Attributes:
        waited: seconds so far in which the device had nothing to do because images were not read yet; what is read
            while it computes costs nothing.
    """

    def __init__(self, setting: Setting, waited: float = 0.0) -> None:
        self._setting = setting
        self._cut = where_read(resolve(setting.config.augmentation, setting.dataset), setting.dataset)
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "hardjax reader")
        self._round: int | None = None  # back-propagations before the round that `_schedule` is of
        self._schedule = np.zeros((0, 0), np.int32)
        self._pending: dict[int, list[Future]] = {}
        self.waited = waited

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def given(self, state: TrainState, dispatch: Dispatch) -> TrainData:
        """What a segment or a look is given of the training split: the images of its steps, on the device.

        Args:
            state: in the midst of the round.
        """
        began = dispatch.before.backprops - dispatch.before.cursor
        cursor, idle = dispatch.before.cursor, _Idle(state.slots)
        if self._round != began:
            self._begin(state, began, dispatch.before.round_steps)
            idle.look()
        # A look leaves its batch for the step that trains it.
        steps = range(cursor, cursor + max(1, dispatch.trained))
        images = np.stack([self._batch(step, idle) for step in steps])
        for step in steps if dispatch.trained else ():
            del self._pending[step]
        self._read_ahead(steps[-1] + 1)
        self.waited += idle.seconds()
        return self._setting.splits["train"]._replace(images=self._placed(images))

    def evaluate(self, variables: Any, name: str) -> Evaluation:
        """Loss and accuracy over a whole split, read part by part; to the bits of resident data."""
        setting, split = self._setting, self._setting.splits[name]
        size = setting.performance.eval_batch_size
        part = evaluate.part_of(split, size)
        labels, held, mesh = np.asarray(split.labels), part.labels.shape[0], setting.recipe.mesh
        if held == len(labels):
            # The very program of resident data.
            images = np.concatenate([future.result() for future in self._indices(name, 0, held)])
            given = split._replace(images=images, rows=None)
            given = jax.device_put(given) if mesh is None else devices.put(given, mesh)
            return setting.programs.evaluate(size, variables, given)

        def parts() -> Iterator[Evaluation]:
            starts = range(0, len(labels), held)
            coming = self._indices(name, starts[0], held)
            for start in starts:
                images = np.concatenate([future.result() for future in coming])
                # The next part is read while this one is evaluated.
                coming = self._indices(name, start + held, held)
                real, lacking = len(images), held - len(images)
                filled = [np.pad(a, ((0, lacking), *((0, 0),) * (a.ndim - 1))) for a in (images, labels[start:][:real])]
                given = split._replace(images=filled[0], labels=filled[1], rows=None)
                given = jax.device_put(given) if mesh is None else devices.put(given, mesh)
                yield setting.programs.evaluate_part(size, variables, given, np.int32(real))

        return evaluate.mean_of_parts(parts(), len(labels))

    def _placed(self, images: np.ndarray) -> Array:
        """Images (steps, part of B, H, W, C) of this process on the devices that share each batch."""
        mesh = self._setting.recipe.mesh
        if mesh is None:
            return jax.device_put(images)
        shape = (len(images), self._schedule.shape[1], *images.shape[2:])
        return jax.make_array_from_process_local_data(devices.over_axis(mesh, 1), images, shape)

    def _own(self) -> slice:
        """Of each batch, the samples that devices of this process hold."""
        if not devices.spans_processes(self._setting.recipe.mesh):
            return slice(None)
        part = self._schedule.shape[1] // jax.process_count()
        return slice(part * jax.process_index(), part * (jax.process_index() + 1))

    def _begin(self, state: TrainState, began: int, length: int) -> None:
        """Take in which samples a round trains; waits for the device."""
        for futures in self._pending.values():
            for future in futures:
                future.cancel()
        # Copies: a view that is still alive when the state is donated disables the donation.
        slots, partition = np.array(state.slots)[:length], np.array(state.partition)
        of_samples = self._setting.plan.selection.unit == "sample"
        self._round, self._schedule, self._pending = began, slots if of_samples else partition[slots], {}

    def _batch(self, step: int, idle: "_Idle") -> np.ndarray:
        """Images (B, H, W, C) of a step of the round; of several processes those of this one."""
        self._begin_reading(step)
        while wait(self._pending[step], _GLANCE).not_done:
            idle.look()
        return np.concatenate([future.result() for future in self._pending[step]])

    def _read_ahead(self, first: int) -> None:
        shape, batch_size = self._setting.recipe.image_shape, self._schedule.shape[1]
        pixel = self._setting.dataset.train.images.dtype.itemsize
        most = max(2, _AHEAD_BYTES // (batch_size * int(np.prod(shape)) * pixel))
        for step in range(first, min(first + most, len(self._schedule))):
            self._begin_reading(step)

    def _begin_reading(self, step: int) -> None:
        if step not in self._pending:
            assert self._round is not None
            draws, own = self._draws(self._round + step, self._schedule.shape[1]), self._own()
            draws = None if draws is None else draws[own]
            self._pending[step] = self._shares(self._setting.dataset.train, self._schedule[step][own], draws)

    def _draws(self, backprops: int, count: int) -> np.ndarray | None:
        """(B, 3) in [0, 1) of a step: of the seed and the step alone, so that a run that goes on draws the same."""
        if self._cut is None:
            return None
        return np.random.default_rng([_DRAWS, self._setting.config.seed, backprops]).random((count, 3))

    def _indices(self, name: str, start: int, count: int) -> list[Future]:
        """Images of neighbouring samples of a split; none beyond its end."""
        split: Split = getattr(self._setting.dataset, name)
        return self._shares(split, np.arange(start, min(start + count, split.num_samples)), None)

    def _shares(self, split: Split, indices: np.ndarray, draws: np.ndarray | None) -> list[Future]:
        """The images of these samples, some to a thread."""
        rows = indices if split.rows is None else np.asarray(split.rows)[indices]

        def read(some: slice) -> np.ndarray:
            if draws is None:
                return split.images[rows[some]]
            return split.images.read(rows[some], draws[some], self._cut)

        return [self._pool.submit(read, slice(at, at + _SHARE)) for at in range(0, len(rows), _SHARE)]
