"""The whole TrainState on disk through Orbax."""

import os
from pathlib import Path
from typing import Any

import jax

from hardjax._validate import Refusal
from hardjax.engine.step import TrainState

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
        raise Refusal(f"No checkpoint in {str(folder)!r}; `hardjax train --output` writes one.")
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
    with ocp.StandardCheckpointer() as checkpointer:
        held, asked = _shapes(checkpointer.metadata(path).item_metadata.tree), _shapes(wanted)
        if differ := sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name)):
            first = f"{differ[0]} ({held.get(differ[0], 'absent')} instead of {asked.get(differ[0], 'absent')})"
            raise Refusal(
                f"The checkpoint in {str(folder)!r} does not fit this configuration: {len(differ)} arrays differ, such"
                f" as {first}."
            )
        plain = checkpointer.restore(path, wanted)
    return TrainState(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _plain(state: TrainState) -> dict[str, Any]:
    return {**state.__dict__, "key": jax.random.key_data(state.key)}
