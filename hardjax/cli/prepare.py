"""From options to a run that can begin: everything that can be refused is refused here, the cheapest first."""

import os

import hardjax.data as data
import hardjax.models as models
from hardjax import _by_name, _validate
from hardjax.cli.data import say
from hardjax.cli.options import Settings
from hardjax.config import TrainConfig
from hardjax.data.decoded import cache_folder
from hardjax.training.setting import Setting, must_stream, prepare


def setting(options: Settings, config: TrainConfig) -> Setting:
    """Data and network of a configuration; names and options are checked before any data is read.

    Raises:
        ValueError: data, network and configuration do not fit, or the data is not there.
    """
    performance = options.performance()
    own = _by_name.is_own(config.model)
    if own:
        _by_name.find(config.model, "model")
    else:
        _validate.one_of(models.names(), model=config.model)
    if _by_name.is_own(config.loss):
        _by_name.find(config.loss, "loss")
    for option in config.model_options:
        if not own and option not in ("name", "num_classes"):  # `prepare` says what these are
            _validate.one_of(models.options(config.model), **{f"option of {config.model}": option})
    stream = must_stream(config, performance)
    dataset = data.load(config.dataset, config.data_dir, progress=not options.quiet, say=say, stream=stream)
    return prepare(config, dataset, performance=performance)


def use_compilation_cache() -> None:
    """Compiled programs outlive the process, in the user's cache folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
