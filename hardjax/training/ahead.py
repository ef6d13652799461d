"""The thread that compiles what later stages of a run will ask for, while the present one trains."""

import threading

from hardjax.engine import jax_settings
from hardjax.engine.ahead import later_stages
from hardjax.engine.plan import Position, RunPlan
from hardjax.training.setting import Setting


class Compiler:
    """Compiles in the background, one program after the other; whoever asks for one that is under way waits for it.

    An error in compiling is told to whoever asks for that program. The thread begins with the first stage that there is
    something to compile for, and ends with the block.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        # Those of the thread that the run is in: programs of other settings are other programs.
        self._settings = jax_settings.shaping()
        self._changed = threading.Condition()
        self._followed: tuple[RunPlan, int] | None = None
        self._stages: tuple[tuple[RunPlan, int], ...] = ()
        self._orders = 0
        self._ended, self._busy = False, False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        # XLA cannot be interrupted, but a second Ctrl-C is not to wait for it. The end of the process does: a thread
        # that comes back from XLA after Python's end takes the process down with it (seen: SIGABRT).
        if self._thread is not None and (kind is None or not issubclass(kind, KeyboardInterrupt)):
            self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether anything is being compiled, or about to be."""
        with self._changed:
            return self._busy or bool(self._stages)

    def follow(self, plan: RunPlan, at: Position) -> None:
        """Take in where the run stands; cheap where its plan, and what may be decided next, are those of before.

        Raises:
            Exception: what went wrong in the thread beside compiling.
        """
        if self._error is not None:
            raise self._error
        followed = plan, plan.next_control(at.backprops) if plan.ladder else 0
        if self._followed is not None and plan is self._followed[0] and followed[1] == self._followed[1]:
            return
        self._followed = followed
        stages = later_stages(plan, at)
        with self._changed:
            self._stages, self._orders = stages, self._orders + 1
            self._changed.notify()
        if stages and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hardjax compiler")
            self._thread.start()

    def _work(self) -> None:
        try:
            with jax_settings.under(self._settings):
                while (ordered := self._next()) is not None:
                    order, plan, index = ordered
                    for kind, key, args, donate in self._setting.stage_programs(plan, index):
                        # A plan that was replaced (its dispatches take longer than expected) needs other programs.
                        if self._ended or order != self._orders:
                            break
                        if kind == "restage":
                            self._setting.warm(key)
                        self._setting.programs.begin(kind, key, *args, donate=donate)
        except Exception as error:  # a thread that ends in an error would end unheard
            self._error = error

    def _next(self) -> tuple[int, RunPlan, int] | None:
        """The next stage to compile for; waits for one. None at the end of the run."""
        with self._changed:
            self._busy = False
            self._changed.wait_for(lambda: self._stages or self._ended)
            if self._ended:
                return None
            first, *rest = self._stages
            self._stages, self._busy = tuple(rest), True
            return self._orders, *first
