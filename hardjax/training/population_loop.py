"""The training loop of a population: one plan and one state on the device, a record of its own for each member."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax.engine.plan import Dispatch, Position
from hardjax.engine.population import member_of, population_inputs
from hardjax.engine.rounds import RoundInfo
from hardjax.engine.state import StepInputs, TrainData, TrainState
from hardjax.training import points
from hardjax.training.loop import Loop
from hardjax.training.population import Population
from hardjax.training.record import Record
from hardjax.training.resume import Start
from hardjax.training.saver import PopulationSaver
from hardjax.training.setting import Setting


class Member:
    """One run of a population under way, as `points.Run` has it.

    Args:
        setting: as if it were a run alone.
        folder: of its files; None keeps its record in memory alone.
        start: where it goes on, or how it ended; None: at its beginning.

    Attributes:
        end: why it ended, or None.
        state: its own, once it has ended.
    """

    input_wait_seconds = None  # of resident data

    def __init__(self, setting: Setting, folder: Path | None, start: Start | None) -> None:
        self.setting = setting
        self.record = Record(setting.plan, folder)
        self.position = Position() if start is None else start.position
        self.seconds = 0.0 if start is None else start.seconds
        self.compile_seconds = 0.0 if start is None else start.compile_seconds
        self.compile_wait_seconds = 0.0 if start is None else start.compile_wait_seconds
        self.resumed_at = () if start is None else start.resumed_at
        self.end = None if start is None else start.end
        self.state: TrainState | None = None if start is None or start.end is None else start.state
        if start is not None and folder is not None:
            self.record.restore(folder, start.record)


class PopulationLoop(Loop):
    """`Loop` of a population. Times are shared evenly by the members that are live.

    Args:
        setting: of the population.
        bar: shows progress.
        members: of the population, in its order.
        saver: writes checkpoints, or None.
        start: the stacked state and the position from which those that have not ended go on, or None.
    """

    def __init__(
        self,
        setting: Population,
        bar: Any,
        members: Sequence[Member],
        saver: PopulationSaver | None = None,
        start: Start | None = None,
    ) -> None:
        # Before anything is compiled.
        self._clocks = setting.programs.compile_seconds, setting.programs.wait_seconds
        super().__init__(setting, bar, 0.0, None, saver, start, record=members[0].record)
        self._population, self.members, self._ends = setting, members, saver
        self._share()

    @property
    def live(self) -> list[int]:
        """Places of the members that go on."""
        return [index for index, one in enumerate(self.members) if one.end is None]

    def facts(self, end: str | None) -> dict[str, Any]:
        """Of each member that goes on what is saved beside its state."""
        return {"members": {index: points.facts(self.members[index], end) for index in self.live}}

    def conclude(self, end: str) -> None:
        """After `go`: how those ended that went on to its end."""
        for index in self.live:
            one = self.members[index]
            one.state, one.end = member_of(self.state, index), end

    def _share(self) -> None:
        """Which members are live, for the programs."""
        self._hyper = self._population.hypers([one.end is None for one in self.members])
        self.record = self.members[(self.live or [0])[0]].record  # whose test points say when to save

    def _inputs(self, dispatch: Dispatch) -> StepInputs:
        return population_inputs([one.plan for one in self._population.filled], dispatch)

    def _issue(self, dispatch: Dispatch) -> None:
        super()._issue(dispatch)
        for index in self.live:
            self.members[index].position = self.position

    def _look(self, unit: str, train: TrainData) -> Any:
        observer = self.setting.observer
        assert observer is not None
        alone = self._population.members[0].programs
        return {index: alone.look(observer, unit, member_of(self.state, index), train) for index in self.live}

    def _looked(self, dispatch: Dispatch, seen: Any) -> None:
        for index, own in seen.items():
            self.members[index].record.looked(dispatch, own)

    def _trained(self, dispatch: Dispatch, info: RoundInfo) -> None:
        live = self.live
        for index in live:
            self.members[index].record.trained(dispatch, jax.tree.map(lambda leaf, i=index: leaf[i], info))
        top1 = None if info.top1 is None else 100 * float(np.mean(info.top1[live]))
        epoch = float(self.plan.epoch(dispatch.after.backprops))
        self.bar.update(epoch, float(np.mean(info.loss[live])), top1)

    def _drain(self) -> None:
        seconds, (compiled, waited) = self.seconds, self._clocks
        super()._drain()
        self._clocks = now = self.setting.programs.compile_seconds, self.setting.programs.wait_seconds
        for index in self.live:
            one = self.members[index]
            one.seconds += (self.seconds - seconds) / len(self.live)
            one.compile_seconds += (now[0] - compiled) / len(self.live)
            one.compile_wait_seconds += (now[1] - waited) / len(self.live)

    def _test(self) -> None:
        self._drain()
        for index in self.live:
            one = self.members[index]
            state = member_of(self.state, index)
            entry = points.test(one, one.setting.plan, state)
            # Whatever is trained, it stays so: the member is kept as it is.
            if self.position.backprops < self.plan.steps and points.is_lost(entry, state):
                if self._ends is not None:
                    self._ends.end(index, state, points.facts(one, "diverged"))
                one.state, one.end = state, "diverged"
        self._share()
        self.bar.tested(entry)

    def _reason_to_stop(self) -> str | None:
        return None if self.live else "diverged"
