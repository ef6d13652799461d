"""Several devices: how many of them a run takes, and where its arrays lie.

Every program is written in global view: a batch is one array, of which each device holds an equal share of the samples,
and the compiler puts in the sums over devices. State, loss table and schedule are on every device alike. The devices
may be those of several processes (`jax.distributed`), each of which issues the same programs in the same order.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hardjax._validate import Refusal, shown

BATCH = "batch"  # the one axis of the mesh: samples of a batch are spread over it


def visible() -> list[jax.Device]:
    """Devices that a run may take: the one that jax was told to use, or all of its default back end."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices() if chosen is None else [chosen] if isinstance(chosen, jax.Device) else jax.devices(chosen)[:1]


def count_for(asked: int | None, *sizes: int) -> int:
    """How many devices a run takes: as asked, or the most that are visible and divide all of these sizes of batches;
    of several processes equally many each.

    Raises:
        ValueError: more than there are, or a number that does not divide them; or the random numbers of another
            generator than threefry, which may be others on other devices.
    """
    there, divisor, processes = len(visible()), math.gcd(*sizes), jax.process_count()
    allowed = [number for number in range(processes, there + 1, processes) if divisor % number == 0]
    threefry = "threefry" in str(jax.config.jax_default_prng_impl)  # type: ignore[attr-defined]
    if processes > 1:
        _check_processes(asked, processes, allowed, sizes)
        asked = asked or allowed[-1]  # none of them may be left to train alone
    if asked is None:
        return allowed[-1] if threefry else 1
    if asked > there:
        raise Refusal(f"Expected devices={asked} to be at most the {there} visible.")
    if asked not in allowed:
        listed = ", ".join(map(str, allowed))
        each = " and ".join(map(str, dict.fromkeys(sizes)))
        raise Refusal(f"Expected devices={asked} to divide the samples of a batch ({each}); allowed here: {listed}.")
    if asked > 1 and not threefry:
        generator = shown(jax.config.jax_default_prng_impl)  # type: ignore[attr-defined]
        raise Refusal(f"Expected one device with jax_default_prng_impl={generator}, whose draws depend on the devices.")
    return asked


def _check_processes(asked: int | None, processes: int, allowed: Sequence[int], sizes: Sequence[int]) -> None:
    """Raises ValueError where not all processes of a job would have a part in every batch."""
    if asked is not None and asked % processes:
        raise Refusal(
            f"Expected devices={asked} to be a multiple of the {processes} processes of this job, which train one run"
            " together; populations and sweeps are trained by processes that know nothing of each other."
        )
    if not allowed:
        each = " and ".join(map(str, dict.fromkeys(sizes)))
        raise Refusal(
            f"Expected the samples of a batch ({each}) in equal parts for the {processes} processes of this job and"
            f" their {len(visible())} devices."
        )


def make_mesh(count: int) -> Mesh | None:
    """The first so many devices, of several processes equally many each; None of one alone, where nothing is to be
    placed.

    Raises:
        ValueError: a process has fewer devices than its part.
    """
    if count == 1:
        return None
    own = [[device for device in visible() if device.process_index == index] for index in range(jax.process_count())]
    each = count // len(own)
    if (fewest := min(map(len, own))) < each:
        raise Refusal(f"Expected {each} devices of every process of this job, got {fewest} of one.")
    # Those of a process side by side: its part of a batch is then one slice.
    chosen = [device for devices in own for device in devices[:each]]
    return Mesh(np.array(chosen), (BATCH,), axis_types=(AxisType.Auto,))


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether other processes hold devices of the mesh."""
    return mesh is not None and mesh.is_multi_process


def everywhere(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_axis(mesh: Mesh, axis: int) -> NamedSharding:
    """An equal part of this axis on every device."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH))


def spread(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """The same arrays, traced, of which each device holds its share along an axis."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, over_axis(mesh, axis))


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """The same arrays, traced, on every device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, everywhere(mesh))


def put(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; as they are without one."""
    return tree if mesh is None else place(tree, everywhere(mesh))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays where a sharding says; of several processes each has all of them, and places what its devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def placed(leaf: Any) -> Array:
        if isinstance(leaf, Array) and not leaf.is_fully_addressable:  # it is there
            return leaf
        # Not `device_put`, which sends everything to the other processes to compare it.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(placed, tree)


def put_shares(rows: Array, mesh: Mesh | None) -> Array:
    """An array of which each device holds a part of the rows; filled up with zeros, which nobody may read, where their
    number is not a multiple of the devices."""
    if mesh is None:
        return rows
    lacking = -len(rows) % mesh.size
    padded = jnp.pad(rows, ((0, lacking), *((0, 0) for _ in rows.shape[1:])))
    return place(padded, over_axis(mesh, 0))


def shapes(tree: Any, mesh: Mesh | None) -> Any:
    """Shapes and dtypes that say where the arrays will be."""
    if mesh is None:
        return tree
    placed = everywhere(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), tree)


def shares(leaf: Any) -> bool:
    """Whether devices hold parts of an array (or its shape), and not each of them the whole."""
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated


def placement(args: Sequence[Any], mesh: Mesh | None) -> dict[str, Any]:
    """Settings of `jax.jit` for a program with these arguments: where they are, and that results are everywhere."""
    if mesh is None:
        return {}
    placed = everywhere(mesh)
    given = jax.tree.map(lambda leaf: leaf.sharding if shares(leaf) else placed, tuple(args))
    return {"in_shardings": given, "out_shardings": placed}
