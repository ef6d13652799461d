"""Flax Linen: modules. The mode is an argument of `__call__` or a field of the module."""

import contextlib
import dataclasses
import inspect
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
from jax import Array

from hardjax.models import modes
from hardjax.models.adapters.base import TRANSIENT, Apply
from hardjax.models.modes import Manner, plain

# Parameters change by their gradient alone; every other collection is watched.
_ALL = flax.core.DenyList(("params",))


def is_ours(model: Any) -> bool:
    """Whether the network is one of the zoo's own classes, which tests have seen: it is neither probed nor checked."""
    module = model.module if isinstance(model, Apply) and model.take is None else model
    return isinstance(module, nn.Module) and type(module).__module__.startswith("hardjax.models.")


class LinenApply(Apply):
    awake = (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError)
    advice = (
        "an argument or a field such as `train` that switches all its layers (around an nn.Sequential: a module that"
        " hands it on)"
    )

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, type(module).__name__)

    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        module = self.module
        signature = list(inspect.signature(type(module).__call__).parameters.values())[1:]
        may_switch, any_keyword = modes.switches(signature[1:])
        fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        switches = [f for f in fields if isinstance(getattr(module, f), bool) or getattr(module, f) is None]
        known, own = modes.known(may_switch), modes.known(switches)
        usual = [Manner(known, ())] if known or not own else []
        usual += [Manner((), own), Manner(known, own)] if own else []
        if any_keyword:
            usual += [Manner((*known, (n, value)), ()) for n, value in modes.NAMES.items() if n not in dict(known)]
        unusual = []
        for value in (True, False) if not known and not own else ():
            unusual += [Manner(((n, value),), ()) for n in may_switch]
            unusual += [Manner((), ((n, value),)) for n in switches if isinstance(getattr(module, n), bool)]
        return usual, unusual

    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, **_streams(manner, dropout_key)}
        return plain(self._in_mode(manner, train).init(rngs, images, **modes.arguments(manner, train)))

    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        module, mode = self._in_mode(manner, train), modes.arguments(manner, train)
        rngs = _streams(manner, key) if train and key is not None else {}
        mutable = (_ALL if watched else ["batch_stats"]) if train else False

        def forward(images: Array) -> Any:
            return module.apply(variables, images, **mode, rngs=rngs, mutable=mutable)

        out = modes.bound(forward, manner.axes)(images)
        if not train:
            return out, {}
        return out[0], {name: value for name, value in plain(out[1]).items() if name not in TRANSIENT}

    def first(self, key: Array, images: Array) -> dict[str, Any]:
        """See `Apply.first`. Layers that exist only in training are made as well. Boxes (`nn.with_partitioning`) are
        taken off."""
        if is_ours(self):
            params_key, dropout_key = jax.random.split(key)
            variables = self.module.init({"params": params_key, "dropout": dropout_key}, images[:1], train=False)
            return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        # A single one where that will do: it is what networks were always understood from.
        manner = modes.understand(self, None, images[:1] if len(images) == 2 else images)
        with modes.refusing(self.name, "cannot be made"):
            variables = self.make(manner, False, key, images[:1])
            trained = self.make(manner, True, key, images)
        # Where both modes make a leaf, evaluation's is taken: it is what a network without further layers always got.
        return self.packed(_merged(trained, variables))

    def __call__(
        self, variables: Mapping[str, Any], images: Array, train: bool, key: Array | None = None
    ) -> tuple[Array, Any]:
        if not is_ours(self):
            return super().__call__(variables, images, train, key)
        variables = {name: value for name, value in variables.items() if name != "batch_stats" or value}
        if not train:
            return self.module.apply(variables, images, train=False), variables.get("batch_stats", {})
        rngs = {} if key is None else {"dropout": key}
        logits, changed = self.module.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    def missing(self, error: BaseException | None, manner: Manner) -> Manner | None:
        """The manner with the random stream or the named axis whose absence was the error."""
        stream = re.search(r'needs PRNG for "([^"]+)"', str(error))
        if stream and stream[1] not in (*manner.streams, "params"):
            return dataclasses.replace(manner, streams=(*manner.streams, stream[1]))
        return super().missing(error, manner)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[Any]]:
        rates: list[Any] = []

        def watch(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
                rates.append(context.module.rate)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(watch):
            yield rates

    def _in_mode(self, manner: Manner, train: bool) -> nn.Module:
        fields = {n: value == train for n, value in manner.fields}
        return self.module.clone(**fields) if fields else self.module


def adapt(model: Any, make: Any, name: str) -> Apply | None:
    """The network of a Linen module."""
    return LinenApply(model) if isinstance(model, nn.Module) else None


def _streams(manner: Manner, key: Array) -> dict[str, Array]:
    """A key for each stream; "dropout" has the key itself, as ever. Equal keys would make streams draw alike."""
    return {s: key if s == "dropout" else jax.random.fold_in(key, zlib.crc32(s.encode())) for s in manner.streams}


def _merged(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    both = {name: _merged(under[name], over[name]) for name in under.keys() & over.keys()}
    return {**under, **over, **both}
