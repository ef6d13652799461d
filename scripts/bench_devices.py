"""Collectives of a training step on 1 to 8 devices, and their bytes, read from the compiled program.

    python scripts/bench_devices.py --model resnet8 --batch 64
    python scripts/bench_devices.py --model resnet8 --batch 64 --h100     # in the environment of gpu_programs.py

Nothing is trained or timed: a CPU with so many forced devices compiles the program that real ones would run, as far as
the partitioner decides; the compiler for so many H100s of one machine, which needs none of them, merges some of the
sums (docs/devices.md).
"""

import argparse
import collections
import os
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "s8": 1, "pred": 1, "s64": 8, "u64": 8}


def collectives(text: str, inside: bool) -> dict[str, tuple[int, int]]:
    """Kind -> (how many, bytes of their results on one device) in a compiled program.

    Args:
        text: of `compiled.as_text()`.
        inside: those of the loop over steps, else the others.
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    kinds = "|".join(COLLECTIVES)
    for line in text.splitlines():
        # Of one that is begun and ended apart, the end: its result is all that it returns.
        match = re.search(rf"= (.*?) ({kinds})(?:-done)?\(", line)
        if match is None or ("/while/body/" in line) != inside:
            continue
        count, size = found[match[2]]
        found[match[2]] = count + 1, size + _size(match[1])
    return dict(found)


def _size(shapes: str) -> int:
    total = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        entries = 1
        for side in filter(None, sides.split(",")):
            entries *= int(side)
        total += entries * _BYTES[kind]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--norm", default=None, help="batch | group | none")
    parser.add_argument("--norm-batch", type=int, help="samples that batch statistics are taken over")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--show", action="store_true", help="print the collectives' lines")
    parser.add_argument("--shard-data", action="store_true")
    parser.add_argument("--h100", action="store_true", help="compiled for H100s, by the compiler for CUDA")
    options = parser.parse_args()
    # Before jax looks for devices.
    flag = f"--xla_force_host_platform_device_count={max(options.devices)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if options.h100 or not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import numpy as np

    import hardjax as hj
    from hardjax.engine import devices
    from hardjax.engine.programs import lowerable
    from hardjax.fisher.rules import rule

    if options.h100:
        import gpu_programs

        gpu_programs.check_compiler()
        rule.on_cpu = lambda: False  # rules of per-sample rows ask while they are traced

    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (count, options.side, options.side, 3), dtype=np.uint8), np.arange(count) % 10

    dataset = hj.data.Dataset.from_arrays(*split(4 * options.batch), *split(options.batch), num_classes=10)
    chosen = {"norm": options.norm, "norm_batch_size": options.norm_batch}
    model_options = {name: value for name, value in chosen.items() if value is not None}
    config = hj.TrainConfig(model=options.model, model_options=model_options, batch_size=options.batch, epochs=1)
    print(f"{options.model}{f' norm={options.norm}' if options.norm else ''}, batch {options.batch}")
    print("| devices | collectives a step | bytes a step and device | outside the steps |\n| ---: | --- | ---: | --- |")
    for count in options.devices:
        mesh = gpu_programs.make_mesh(count) if options.h100 else devices.make_mesh(count)
        named = lowerable(config, dataset, bound=2, mesh=mesh)
        name = next(name for name in named if name.startswith("segment"))
        function, args = named[name]
        if options.shard_data and mesh is not None:
            held = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(devices.BATCH))
            images = jax.ShapeDtypeStruct(args[1].images.shape, args[1].images.dtype, sharding=held)
            args = (args[0], args[1]._replace(images=images), *args[2:])
        text = jax.jit(function, **devices.placement(args, mesh)).lower(*args).compile().as_text()
        if options.show:
            print(
                *(line.strip()[:260] for line in text.splitlines() if re.search("|".join(COLLECTIVES), line)), sep="\n"
            )
        step, rest = collectives(text, True), collectives(text, False)
        shown = ", ".join(f"{number} {kind} ({size:,})" for kind, (number, size) in step.items()) or "none"
        outside = ", ".join(f"{number} {kind}" for kind, (number, _) in rest.items()) or "none"
        print(f"| {count} | {shown} | {sum(size for _, size in step.values()):,} | {outside} |", flush=True)


if __name__ == "__main__":
    main()
