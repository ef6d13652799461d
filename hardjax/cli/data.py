"""`hardjax data list | prepare | check`."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from hardjax.cli import output
from hardjax.cli.parsing import Folder, parse


@dataclass(frozen=True)
class DataList:
    """List the data sets and what of them is on this machine."""

    data_dir: Folder = None  # folder of prepared TFDS data

    def __call__(self) -> None:
        from hardjax.data import prepare

        output.table("data sets", prepare.status(self.data_dir))


@dataclass(frozen=True)
class DataPrepare:
    """Download and prepare a data set (needs the network and `pip install hardjax[prepare]`)."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: Folder = None  # folder for prepared TFDS data

    def __call__(self) -> None:
        from hardjax.data import prepare

        print(f"{self.name} is prepared in {prepare.prepare(self.name, self.data_dir)}")


@dataclass(frozen=True)
class DataCheck:
    """Read a prepared data set whole, check it, and report counts, shapes, statistics, and the state of its cache."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: Folder = None  # folder of prepared TFDS data

    def __call__(self) -> None:
        from hardjax.data import prepare

        report = prepare.check(self.name, self.data_dir, say)
        output.table(self.name, [{"what": what, "found": found} for what, found in report.items()])


@dataclass(frozen=True)
class Data:
    """List, prepare or check data sets."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[DataList, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[DataPrepare, tyro.conf.subcommand("prepare", prefix_name=False)]
        | Annotated[DataCheck, tyro.conf.subcommand("check", prefix_name=False)]
    ]


def say(line: str) -> None:
    """A line on standard error."""
    print(f"hardjax: {line}", file=sys.stderr)


def run(arguments: list[str]) -> int:
    """Do what the action says; returns the exit code."""
    parse(Data, "data", arguments).action()
    return 0
