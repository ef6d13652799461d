"""The whole TrainState on disk through Orbax."""

import os
from pathlib import Path
from typing import Any

import jax

from hardjax.train import TrainState

# Orbax takes over half a second to import, so it is imported where it is used.


def save(folder: str | os.PathLike, state: TrainState) -> Path:
    """Write the state to `folder/checkpoint`, replacing what is there."""
    import orbax.checkpoint as ocp

    path = Path(folder).resolve() / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _plain(state), force=True)
    return path


def restore(folder: str | os.PathLike, like: TrainState) -> TrainState:
    """Read `folder/checkpoint` into the shapes, dtypes and shardings of `like`.

    Raises:
        ValueError: there is no checkpoint, or it belongs to another configuration.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).resolve() / "checkpoint"
    if not path.is_dir():
        raise ValueError(f"No checkpoint in {str(folder)!r}; `hardjax train --output` writes one.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            plain = checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like)))
        except (ValueError, KeyError) as error:
            raise ValueError(f"The checkpoint in {str(folder)!r} does not fit this configuration: {error}") from error
    return TrainState(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})


def _plain(state: TrainState) -> dict[str, Any]:
    return {**state.__dict__, "key": jax.random.key_data(state.key)}
