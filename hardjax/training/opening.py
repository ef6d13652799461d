"""The folder of a run before it begins: whether it may be written, who holds it, and where the run in it goes on."""

import os
from contextlib import ExitStack
from pathlib import Path

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.training import checkpoint, files, hosts
from hardjax.training import resume as resuming
from hardjax.training.record import Record
from hardjax.training.saver import Saver, check_space
from hardjax.training.setting import Setting


def check_output(output: str | os.PathLike | None, overwrite: bool, resume: bool) -> None:
    """Look whether a run could write there; touches nothing.

    Raises:
        ValueError: it holds something else, or the wishes contradict each other.
    """
    if overwrite and resume:
        raise Refusal("Give overwrite=True (--overwrite) or resume=True (--resume), not both.")
    if output is None:
        if resume:
            raise Refusal("Expected output= with resume=True: the folder of the run to go on with.")
        return
    folder = files.check_folder(output, overwrite or resume)
    if resume:
        files.check_resumable(folder)


def opened(
    held: ExitStack, setting: Setting, output: str | os.PathLike | None, overwrite: bool, resume: bool
) -> tuple[Path | None, resuming.Start | None, Saver | None]:
    """The folder, held, where the run in it goes on, and what saves into it; none of them in processes that follow."""
    if not hosts.leads():
        return None, None, None
    check_output(output, overwrite, resume)
    if output is None:
        return None, None, None
    performance = setting.performance
    limit = None if performance.checkpoint_gigabytes is None else 1e9 * performance.checkpoint_gigabytes
    check_space(limit, setting.state_shapes())
    folder = held.enter_context(files.claim_folder(output, overwrite, keep=True))
    checkpoint.clean(folder)
    start = resuming.find(folder, setting) if resume else None
    return folder, start, held.enter_context(Saver(folder, performance.save_every, limit))


def followed(
    setting: Setting,
    output: str | os.PathLike | None,
    resume: bool,
    start: resuming.Start | None,
    folder: Path | None,
) -> tuple[resuming.Start | None, Record | None]:
    """Where a run of several processes goes on, as process 0 found it, and the record of one that follows."""
    if not (resume and output is not None and hosts.several()):
        return start, None
    step = hosts.told(-1 if start is None else start.position.backprops)
    with hosts.together("read the run that it is to go on with"):
        if folder is not None or step < 0:
            return start, None
        where = _validate.local_folder(output=output)
        start = resuming.followed(where, setting, step)
        record = Record(setting.plan.following(start.position.decided))
        record.restore(where, start.record, writes=False)
    return start, record
