"""What of jax's settings shapes a program: programs of the same name under other settings are other programs."""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

SHAPING = (
    "enable_x64",
    "default_matmul_precision",
    "default_device",
    "default_prng_impl",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
    "threefry_partitionable",
)


def shaping() -> tuple[Hashable, ...]:
    """The values of `SHAPING` in this thread."""
    return tuple(getattr(jax.config, f"jax_{name}") for name in SHAPING)


@contextmanager
def under(found: tuple[Hashable, ...]) -> Iterator[None]:
    """What `shaping` found in another thread: a `with` block around a run holds for its own thread alone."""
    with ExitStack() as held:
        for name, value in zip(SHAPING, found, strict=True):
            held.enter_context(getattr(jax, name)(value))
        yield


def remembered(function: Callable) -> Callable:
    """The function with its last results kept, of hashable arguments, each for the settings that it was made under."""

    @functools.lru_cache(maxsize=16)
    def kept(settings: tuple[Hashable, ...], *args: Any) -> Any:
        return function(*args)

    @functools.wraps(function)
    def remembering(*args: Any) -> Any:
        return kept(shaping(), *args)

    return remembering
