"""What a population needs before its first step: settings of members that share one program, and how they are run."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hardjax._validate import Refusal, shown
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.population import DIFFERING, Members, PopulationPrograms, stack
from hardjax.engine.recipe import make_hyper
from hardjax.engine.state import TrainState, replace
from hardjax.training import lines
from hardjax.training.setting import LEAST_BOUND, Setting, prepare, run_plan


@dataclass(frozen=True)
class Population(Setting):
    """Settings of runs that differ in what a program takes as an input, to be trained together.

    All that members share is the setting of the first one. Where there are fewer members than places, copies of the
    last one that are never live fill up, so that chunks of a grid share one program.

    Attributes:
        members: of the population, each as if it were a run alone.
        mode: "vmap" or "map".
        places: members of the program.
    """

    members: tuple[Setting, ...] = ()
    mode: str = "map"
    places: int = 0

    @property
    def filled(self) -> tuple[Setting, ...]:
        """The member of each place."""
        return (*self.members, *self.members[-1:] * (self.places - len(self.members)))

    def init_state(self) -> TrainState:
        """First states, stacked."""
        filled = self.filled
        seeds, hypers = [one.config.seed for one in filled], [one.hyper for one in filled]
        state = self.programs.init(self.sizes, seeds, hypers, self._empty_table(self.sizes))
        if self.start is None:
            return state
        given = jax.tree.map(
            lambda new, old: stack([jnp.asarray(new, old.dtype)] * len(old)), self.start, state.variables
        )
        return replace(state, **given)

    def hypers(self, live: Sequence[bool]) -> Members:
        """What the programs take of the members.

        Args:
            live: of each member, whether it goes on.
        """
        places = [*live, *[False] * (self.places - len(self.members))]
        return Members(stack([one.hyper for one in self.filled]), jnp.asarray(places))


def prepare_population(
    configs: Sequence[TrainConfig],
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    variables: Any = None,
    *,
    mode: str,
    places: int | None = None,
) -> Population:
    """Everything that a population needs before its first step.

    Args:
        configs: of the members; the other arguments are those of `prepare`.
        mode: "vmap" or "map".
        places: members that the program is made for; None: as many as there are.

    Raises:
        ValueError: members differ in what a program does not take as an input, or in what `prepare` refuses.
    """
    check_members(configs)
    # Its members fill a device; what they share is not spread over several.
    first = prepare(configs[0], dataset, model, _on_one_device(performance), variables)
    if first.dataset.streamed:
        raise not_resident(first.dataset.name)
    places = len(configs) if places is None else places
    # One member after the other takes as many times as long; so does a CPU for all at once.
    in_turn = mode == "map" or jax.default_backend() == "cpu"
    bound = first.plan.bound
    if first.performance.steps_per_dispatch is None and in_turn:
        bound = max(LEAST_BOUND, bound // places)
    members = tuple(
        _member(first, config, bound, f"vmap of {places}" if mode == "vmap" else None) for config in configs
    )
    shared = {field.name: getattr(members[0], field.name) for field in dataclasses.fields(Setting)}
    programs: Any = PopulationPrograms(first.recipe, mode)
    return Population(**shared | {"programs": programs}, members=members, mode=mode, places=places)


def not_resident(name: str) -> Refusal:
    """Of streamed data."""
    return Refusal(
        f"Expected resident data in a population, got {name} streamed: its members train different samples, each of"
        " which would have to be read."
    )


def _on_one_device(performance: Performance | None) -> Performance:
    performance = Performance() if performance is None else performance
    if performance.devices not in (None, 1):
        raise Refusal(f"Expected devices=1 in a population, got {performance.devices}: its members share one device.")
    return dataclasses.replace(performance, devices=1)


def _member(first: Setting, config: TrainConfig, bound: int, population: str | None) -> Setting:
    named = dataclasses.replace(config, dataset=first.config.dataset, model=first.config.model)
    plan = run_plan(named, first.recipe, first.performance, bound)
    return dataclasses.replace(first, config=named, plan=plan, hyper=make_hyper(named), population=population)


def check_members(configs: Sequence[TrainConfig]) -> None:
    """Look whether runs may be members of one population.

    Raises:
        ValueError: there is none, one asks for what no population does, or they differ in what its program does not
            take as an input.
    """
    if not configs:
        raise Refusal("Expected a population of one member at least, got none.")
    for config in configs:
        if not isinstance(config, TrainConfig):
            raise Refusal(f"Expected configs of TrainConfig, got {shown(config)}.")
    for config in configs:
        if (reason := why_alone(config)) is not None:
            raise Refusal(reason)
        if (name := differing(configs[0], config)) is not None:
            one, other = (found.to_dict().get(name, getattr(found, name)) for found in (configs[0], config))
            raise Refusal(
                f"Expected members of one population to share {name}, got {shown(one)} and {shown(other)}; they may"
                f" differ in {', '.join(DIFFERING)}."
            )


def differing(one: TrainConfig, other: TrainConfig) -> str | None:
    """The first setting in which two runs differ and that no program takes as an input; None where they may share a
    program."""
    found, wanted = (json.loads(lines.encode(config.to_dict())) for config in (one, other))
    # Of what is written only where it is set, one of the two may have nothing.
    names = (name for name in {**found, **wanted} if name not in DIFFERING)
    apart = [name for name in names if found.get(name) != wanted.get(name)]
    # The stages of a multi-step plan begin where the rate falls.
    if not apart and one.batch_plan is not None and one.batch_plan.multi_step and one.schedule != other.schedule:
        return "schedule"
    return apart[0] if apart else None


def why_alone(config: TrainConfig) -> str | None:
    """Why a run cannot be a member of a population of several; None where it can."""
    if config.batch_plan is not None and config.batch_plan.controller is not None:
        return (
            f"Expected no controlled batch_plan={config.batch_plan.title!r} in a population: its members would decide"
            " on different batch sizes, which one program does not have."
        )
    if config.on_nan == "stop":
        return (
            "Expected on_nan='record' or 'skip-step' in a population, got 'stop': its members end together, and one"
            " that diverged is kept as it is from its next test point on."
        )
    return None


def wanted(performance: Performance | None, on_cpu: str) -> str:
    """How populations are to be trained.

    Args:
        on_cpu: how on a CPU where nothing is said.
    """
    if performance is not None and performance.population is not None:
        return performance.population
    return on_cpu if jax.default_backend() == "cpu" else "auto"
