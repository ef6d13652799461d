"""Names of parameters."""

from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree of variables as {"path/of/leaf": leaf}."""
    return {"/".join(_path(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _path(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
