"""An experiment's configurations as a program of its own, to be edited."""

import pprint
from typing import Any

from hardjax._validate import Refusal
from hardjax.config import TrainConfig
from hardjax.study.experiments import Experiment, Scale

_WIDTH = 116

_PROGRAM = '''"""{title} ({source}), {scale} scale.

Copied by `hardjax table copy {name}`. Run it: python FILE [DATA_DIR] (the folder of prepared data); the rows go to
runs/{name}/sweep.jsonl, and the same command goes on where it stopped. Settings that are not named hold their defaults.
"""

import sys

import hardjax as hj

BASE = {base}

# Arm -> what it sets.
ARMS = {arms}

RUNS = {runs}  # seeds of each arm

FEWER = {fewer}  # seeds of arms that have fewer of them


def configs(data_dir: str | None = None) -> list[hj.TrainConfig]:
    """Seed by seed, so that what there is at any time compares all arms."""
    return [
        hj.TrainConfig.from_dict(BASE | settings | {{"seed": BASE.get("seed", 0) + place, "data_dir": data_dir}})
        for place in range(RUNS)
        for arm, settings in ARMS.items()
        if place < FEWER.get(arm, RUNS)
    ]


if __name__ == "__main__":
    found = hj.sweep(configs(*sys.argv[1:2]), output="runs/{name}", workers="auto")
    print(len(found.rows), "rows,", len(found.failed), "failed,", found.left, "left")
'''


def program(experiment: Experiment, scale: str) -> str:
    """The text of a Python program that trains an experiment.

    Raises:
        ValueError: it has no such scale, or reads the rows of others.
    """
    if scale not in experiment.scales:
        others = f"; it has {', '.join(experiment.scales)}" if experiment.scales else ""
        others = f"; it reads the rows of {', '.join(experiment.reads)}: copy those" if experiment.reads else others
        raise Refusal(f"{experiment.name} has no configurations at the {scale} scale{others}.")
    size = experiment.scales[scale]
    base = _differing(size.base.to_dict(), TrainConfig().to_dict())
    return _PROGRAM.format(
        title=experiment.title[0].upper() + experiment.title[1:],
        source=experiment.source,
        scale=scale,
        name=experiment.name,
        base=_text(base),
        arms=_text({arm: _of_arm(size, arm) for arm in size.arms}),
        runs=size.runs,
        fewer=_text(dict(size.fewer)),
    )


def _of_arm(size: Scale, arm: str) -> dict[str, Any]:
    found = _differing(size.config(arm).to_dict(), size.base.to_dict())
    return {name: value for name, value in found.items() if name != "seed"}


def _differing(settings: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != there[name]}


def _text(content: Any) -> str:
    return pprint.pformat(content, width=_WIDTH, sort_dicts=False)
