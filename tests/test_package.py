"""The package as it is imported: light until a name is asked for, and every name there."""

import subprocess
import sys

HEAVY = (
    "jax",
    "flax",
    "optax",
    "tyro",
    "numpy",
    "rich",
    "matplotlib",
    "scipy",
    "orbax",
    "sklearn",
    "tensorflow_datasets",
)


def test_help_and_names_without_anything_heavy():
    code = (
        "import sys, hardjax, hardjax.cli\n"
        "for words in (['--help'], ['--version'], ['tran']):\n"
        "    try: hardjax.cli.main(words)\n"
        "    except SystemExit as stop: print('code', stop.code)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], hardjax.__version__, 'run' in dir(hardjax))\n"
        "namespace = {}\n"
        "exec('from hardjax import *', namespace)\n"
        "print(sorted(set(hardjax.__all__) - set(namespace)), namespace['results'].__name__)\n"
        "print(hardjax.selection.HardBatches(0.5), hardjax.trimming.Trimming().end, hardjax.data.names()[0])\n"
        "print(hasattr(hardjax, 'nothing'), namespace['run'] is hardjax.run, hardjax.models.names()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *before, found, names, objects, last = done.stdout.splitlines()
    shown = [line.split()[-1] for line in before if line.startswith("code")]
    assert shown == ["0", "0", "2"] and "did you mean 'train'" in done.stderr
    assert found.startswith("[] ") and found.endswith(" True")
    assert names == "[] hardjax.training.files" and objects == "HardBatches(delta=0.5) 0.2 digits"
    assert last.startswith("False True ")


def test_the_commands_say_what_the_top_level_says_of_them():
    import importlib

    from hardjax.cli.main import COMMANDS

    for name, about in COMMANDS.items():
        command = getattr(importlib.import_module(f"hardjax.cli.{name}"), name.title())
        assert command.__doc__.startswith(about), name
