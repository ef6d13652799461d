"""What a controller of the batch size is told of a run under way, from its record alone, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hardjax.choose import control
from hardjax.choose.control import Decision, Measured
from hardjax.engine.stages import Change, Position, RunPlan
from hardjax.fisher import measures, trajectory
from hardjax.fisher.observe import epochs_stood_for
from hardjax.training.setting import Setting
from hardjax.training.spectra import Spectra


class Decider:
    """Decides at control points. What was read of a spectrum is kept, and can be read again from the record: a run that
    goes on decides as if it had never been cut short."""

    def __init__(self, setting: Setting) -> None:
        plan, self._measure = setting.config.batch_plan, setting.config.measure
        self._controller = None if plan is None else plan.controller
        self._measured: list[Measured] = []

    def decide(
        self, plan: RunPlan, at: Position, spectra: Spectra, decisions: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The line of a decision, see `control.entry`.

        Args:
            spectra: measured so far.
            decisions: lines so far.
        """
        controller, arrays = self._controller, spectra.arrays()
        assert controller is not None
        self._read(arrays)
        decided = [int(np.searchsorted(arrays["step"], line["backprops"])) for line in decisions[-2:]]
        epoch, size = int(plan.epoch(at.backprops)), plan.batch_size(at.backprops)
        seen = control.see(controller, self._measured, decided, epoch, size, plan.share_of_rate)
        return control.entry(controller, seen, control.decide(controller, seen), at.backprops, int(plan.epochs))

    def _read(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Measurements that are new."""
        new = slice(len(self._measured), None)
        values, rates, sizes, entries, steps = (
            arrays[name][new] for name in ("eigenvalues", "learning_rate", "batch_size", "mean_entry", "stands_for")
        )
        shares = epochs_stood_for(arrays)[new]
        assert self._measure is not None
        path = trajectory(values, rates, sizes, tolerance=self._measure.tolerance)
        for row, (size, entry, stood, share) in enumerate(zip(sizes, entries, steps, shares, strict=True)):
            # Both follow from the trace: given as the only eigenvalue, one compiled program serves every batch size.
            trace = np.maximum(np.asarray(values[row][:size], np.float64), 0).sum(keepdims=True)
            noise = measures(trace, float(rates[row]), float(size), mean_entry=float(entry))
            found = path.condition_number[row], path.energy[row], stood, share
            self._measured.append(Measured(*map(float, (*found, noise.covariance, noise.signal))))


def change_of(line: Mapping[str, Any]) -> Change | None:
    """What a decision changed; None where everything stays."""
    decision = Decision(*(line[name] for name in Decision._fields))
    if decision.action == "keep":
        return None
    return Change(line["backprops"], decision.size, line["seen"]["rate"] * decision.rate_factor)
