"""Settings: `TrainConfig` changes results, `Performance` changes only speed and memory."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hardjax import _settings, _validate
from hardjax._axis import UNWRITTEN, axes, axis
from hardjax._validate import Refusal
from hardjax.choose import batch_plan, losses, selection, trimming
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import AllBatches, Selection
from hardjax.choose.trimming import PATHS, Trimming
from hardjax.data import augment
from hardjax.data.augment import Augmentation
from hardjax.engine import norm_statistics, optimizers, rates
from hardjax.engine.rates import Schedule
from hardjax.fisher import observe
from hardjax.fisher.observe import FisherMeasure

PRECISIONS = ("default", "high", "highest")
ON_NAN = ("record", "stop", "skip-step")
COMPILE_AHEAD = ("background", "first", "off")
POPULATIONS = ("auto", "vmap", "map", "workers")
DEFAULT_LEARNING_RATE = 0.005  # P1
DEFAULT_BATCH_SIZE = 128


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run, as JSON.

    Attributes:
        dataset: name for `hj.data.load`.
        data_dir: folder of prepared TFDS data; None takes TFDS's own default.
        train_samples: of the training split, each class in proportion, the same ones whatever the seed; None: all.
        validation: share of the training split (of these samples) held out for choosing; the test split is for
            reporting.
        model: name for `hj.models.create`, or "package.module:Name" or "./file.py:Name" of a network of one's own:
            a run, its resumption and its measurement then run that code.
        model_options: its options; of one's own, arguments of the class or function that the name stands for.
        loss: of each sample: the name of a loss of optax (`losses.NAMES`; where it gives several numbers of a sample,
            their mean), a function of (outputs (B, ...), labels (B, ...)) that gives (B,) losses, or the name of one,
            "package.module:name" or "./file.py:name", whose code is then run. By it batches and samples are ranked,
            trained and measured.
        epochs: E; the run makes exactly E * N back-propagations, N = ceil(n / batch_size).
        batch_size: B samples; the last batch of a partition is filled by wrapping round the same permutation. Left
            alone where a batch plan says the sizes.
        selection: which mini-batches a round trains: all-batches, hard-batches, random-batches or hard-samples.
        trimming: train only the largest losses of each batch (a `Trimming`); None trains all.
        batch_plan: batch sizes that change while training (a `BatchPlan`), by stages or by a controller that reads the
            measurements: at each change batches are drawn anew, a loss table begins with a full epoch again, and the
            optimiser's state goes on; None: one size.
        rate_scaling: peak rate of a stage relative to the first one's: "none", "linear" or "sqrt" of the batch size.
        optimizer: one of `optimizers.NAMES`.
        momentum: read by `momentum` and `nesterov`.
        learning_rate: peak rate for a batch's mean loss; 0.005 if neither rate is given.
        base_learning_rate: learning_rate / batch_size (P4's axis); give one of the two.
        weight_decay: L2 on every parameter.
        schedule: a `Schedule`, or its kind.
        augmentation: "none", "standard" (random crops, and flips where they keep the label) or an `Augmentation`.
        precision: of matrix products and convolutions: "default" (float32; TF32 on recent GPUs), "high", "highest".
        test_every: a number of epochs ("epoch" is 1: once per N back-propagations), each test at the first round
            boundary at or after, or "round". Test points are also where saving, stopping and averages of what was
            trained go by; between them several epochs of a small data set fit one dispatch.
        evaluate_train: evaluate the whole training split at every test point (full_train_loss, full_train_top1).
        norm_statistics: of batch norm at test points: "running" averages, or "re-estimated" on the training split
            before every test (P4, section 2.3): each batch of the present partition counts alike, normalised by itself
            as in training. Training and its state stay as they are.
        measure: spectra of per-sample gradients in training (a `fisher.FisherMeasure`); None measures none.
        on_nan: what becomes of a bad step, one whose loss (the mean over the samples trained) or any gradient is not
            finite: "record" takes it like any other (divergence is a result); "stop" ends the run at the next test
            point, also after a spectrum (`measure`) that is not finite; "skip-step" leaves parameters, optimiser and
            batch statistics as they were and goes on: the step counts in the budget and among the visits.
        seed: initial weights, partition, selection, augmentation.

    Raises:
        ValueError: a value outside what is allowed, in one line.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    train_samples: int | None = None
    validation: float = 0.0
    model: str = "mlp"
    model_options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # a dict: equal ones still hash alike
    loss: str | Callable = field(default=losses.CROSS_ENTROPY, hash=False)  # people's own may have none
    epochs: int = 10
    batch_size: int = DEFAULT_BATCH_SIZE
    selection: Selection = axis(selection.AXIS, default_factory=AllBatches)
    trimming: Trimming | None = axis(trimming.AXIS)
    batch_plan: BatchPlan | None = axis(batch_plan.AXIS)
    rate_scaling: str = "none"
    optimizer: str = "momentum"
    momentum: float = 0.9
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    weight_decay: float = 0.0
    schedule: Schedule | str = axis(rates.AXIS, default_factory=Schedule)
    augmentation: Augmentation | str = axis(augment.AXIS, "none")
    precision: str = "default"
    test_every: int | str = "epoch"
    evaluate_train: bool = True
    # In no JSON where it is the default: the settings of runs and rows of before it was there stay theirs.
    norm_statistics: str = field(default=norm_statistics.RUNNING, metadata=UNWRITTEN)
    measure: FisherMeasure | None = axis(observe.AXIS)
    on_nan: str = "record"
    seed: int = 0

    def __post_init__(self) -> None:
        # A class has all attributes that the protocol asks for: HardBatches for HardBatches(0.2) would pass as one.
        if not isinstance(self.selection, Selection) or isinstance(self.selection, type):
            shown = _validate.shown(self.selection)
            raise Refusal(f"Expected selection={shown} to be a strategy such as HardBatches(delta=0.2).")
        # Before any value is looked at: "no" for evaluate_train is true, and np.int64(1) is no JSON.
        _settings.settle(self)
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule(self.schedule))
        if isinstance(self.augmentation, str):
            _validate.one_of(augment.PRESETS, augmentation=self.augmentation)
        losses.check(self.loss)
        if (name := losses.name_of(self.loss)) in losses.NAMES:  # optax's own functions go by their names
            object.__setattr__(self, "loss", name)
        if self.data_dir is not None:
            _validate.local_folder(data_dir=self.data_dir)
        _validate.at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        if self.train_samples is not None:
            _validate.at_least(2, train_samples=self.train_samples)
        self._settle_batch_plan()
        _validate.at_least(0, seed=self.seed)
        if self.seed >= 2**32:
            raise Refusal(f"Expected seed={self.seed} below 2^32.")
        _validate.in_unit(validation=self.validation, momentum=self.momentum)
        _validate.not_negative(weight_decay=self.weight_decay)
        for name, declared in axes(type(self)).items():
            smallest = min(self.batch_sizes)
            if getattr(self, name) is not None and smallest < declared.least_batch_size:
                least = declared.least_batch_size
                raise Refusal(f"Expected batch_size={smallest} to be at least {least} with {name}.")
        _validate.one_of(optimizers.NAMES, optimizer=self.optimizer)
        _validate.one_of(PRECISIONS, precision=self.precision)
        if isinstance(self.test_every, str) and re.fullmatch(r"[0-9]{1,18}", self.test_every):
            object.__setattr__(self, "test_every", int(self.test_every))
        if isinstance(self.test_every, int):
            _validate.at_least(1, test_every=self.test_every)
            if self.test_every == 1:  # one word for one thing: configurations are compared as they are written
                object.__setattr__(self, "test_every", "epoch")
        elif self.test_every not in ("epoch", "round"):
            raise Refusal(
                f"Expected test_every={_validate.shown(self.test_every)} to be epoch, round or a number of epochs."
            )
        _validate.one_of(ON_NAN, on_nan=self.on_nan)
        _validate.one_of(norm_statistics.NAMES, norm_statistics=self.norm_statistics)
        if self.learning_rate is not None and self.base_learning_rate is not None:
            raise Refusal(
                f"Give learning_rate={self.learning_rate} or base_learning_rate={self.base_learning_rate}, not both."
            )
        for name in ("learning_rate", "base_learning_rate"):
            if getattr(self, name) is not None:
                _validate.positive(**{name: getattr(self, name)})
        _validate.in_float32(learning_rate=self.peak_learning_rate, weight_decay=self.weight_decay)
        if isinstance(self.schedule, Schedule) and self.schedule.kind == "step":
            decays = len(self.schedule.decay_at)
            _validate.in_float32(**{f"learning_rate after {decays} decays": self._last_rate(decays)})

    def _settle_batch_plan(self) -> None:
        _validate.one_of(batch_plan.SCALINGS, rate_scaling=self.rate_scaling)
        if self.batch_plan is None:
            if self.rate_scaling != "none":
                raise Refusal(f"Expected rate_scaling={self.rate_scaling!r} with a batch_plan, which changes the size.")
            return
        if self.batch_size != DEFAULT_BATCH_SIZE:
            given = f"batch_size={self.batch_size} or batch_plan={self.batch_plan.title!r}"
            raise Refusal(f"Give {given}, not both: the plan says the sizes.")
        if self.batch_plan.controller is not None and self.measure is None:
            words = "with measure (--measure-every), which its controller decides by"
            raise Refusal(f"Expected batch_plan={self.batch_plan.title!r} {words}.")
        if self.batch_plan.multi_step and not (isinstance(self.schedule, Schedule) and self.schedule.kind == "step"):
            raise Refusal(
                f"Expected batch_plan={self.batch_plan.text!r} with a step schedule, whose phases each repeat it."
            )

    def _last_rate(self, decays: int) -> float:
        """The peak rate decayed so many times; never rounded to 0, which a rate may be and a decayed one is not."""
        assert isinstance(self.schedule, Schedule)
        try:
            return max(self.peak_learning_rate * self.schedule.decay_factor**decays, math.ulp(0.0))
        except OverflowError:
            return math.inf

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Of the stages in order, or all that a controller may choose, the first one first; one without a plan."""
        return (self.batch_size,) if self.batch_plan is None else self.batch_plan.sizes

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate of a batch's mean loss, in the first stage, before the schedule's factor."""
        if self.base_learning_rate is not None:
            return self.base_learning_rate * self.batch_sizes[0]
        return DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate

    @property
    def title(self) -> str:
        """Network, its options and data, for tables and pictures."""
        options = "".join(f" {name}={value}" for name, value in self.model_options.items())
        return f"{self.model}{options} on {self.dataset}"

    @property
    def batches(self) -> str:
        """Batch size or plan, for tables and pictures."""
        return f"batch {self.batch_size if self.batch_plan is None else self.batch_plan.title}"

    def columns(self, history: Mapping[str, Any]) -> dict[str, Any]:
        """What tables show of a run's history for the axes that are on: column -> number or text."""
        found: dict[str, Any] = {}
        for name, declared in axes(type(self)).items():
            if getattr(self, name) is not None:
                found |= declared.columns(getattr(self, name), history)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back, a function as loss by its name."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {name: declared.write(content[name]) for name, declared in axes(type(self)).items()}
        content["loss"] = losses.name_of(self.loss)
        for one in dataclasses.fields(self):
            if one.metadata == UNWRITTEN and content[one.name] == one.default:
                del content[one.name]
        return _settings.plain("settings", content, Mapping[str, Any])

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "TrainConfig":
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: an unknown setting (the closest one is offered) or value.
        """
        if not isinstance(plain, Mapping):
            raise Refusal(f"Expected settings={_validate.shown(plain)} to be a JSON object.")
        declared = {name: found for name, found in axes(cls).items() if name in plain}
        return _settings.read(cls, dict(plain) | {name: a.read(plain[name], name) for name, a in declared.items()})


def _exact(default: Any) -> Any:
    """A setting that changes no bit of a result."""
    return field(default=default, metadata={"effect": "exact"})


def _rounding(default: Any) -> Any:
    """A setting that changes results by rounding alone."""
    return field(default=default, metadata={"effect": "rounding"})


@dataclass(frozen=True)
class Performance:
    """Settings that change speed and memory, never results beyond rounding.

    Each field is marked (`Performance.effects`): `exact` ones change no bit of what a run reports (times aside, on a
    CPU), `rounding` ones sum in another order.

    Attributes:
        steps_per_dispatch: most steps in one call of the device: short rounds run several together, longer ones are
            cut. None: what takes about a second, found by timing, so that Ctrl-C is heard and progress is seen.
        donate: let a dispatch overwrite the state that it was given.
        eval_batch_size: samples per evaluation batch, and of the batches that statistics are estimated on at a time.
        trim_path: "auto" (the fastest exact one), "plain", "gather" (least memory) or "reuse", see `trimming`; refused
            where it would change the result.
        trim_programs: most programs compiled for the counts that trimming keeps.
        save_every: when a run with an output folder saves itself: a number of test points, a time ("90s", "10min",
            "2h", which may cut an epoch), "end" (only then); None: at a test point, at most once a minute.
        checkpoint_gigabytes: disk that a run's checkpoints may take together (the last two, the best by validation, the
            last that was finite); the oldest go first. None: no limit.
        gram_chunk: samples whose rows of one layer are in memory at a time when spectra are measured; None: all.
        devices: that share every batch, whose sums then go across them; None: the most that are visible and divide all
            batches.
        shard_data: each device holds a part of the images instead of all of them; reading a batch then goes across
            devices.
        micro_batch: samples of a batch that are differentiated at a time, their gradients summed: the memory of such a
            part. Trimming then takes its losses in a pass of its own; spectra are of the whole batch, whose memory
            `gram_chunk` bounds. Refused where it would change the result. None: the whole batch at once.
        stream: leave the images on the disk (or, of one's own data, in the host's memory) and read those of a round
            when it has been planned; None: where they would take more than half of what the device has left.
        compile_ahead: when the programs of a batch plan's later stages are compiled: "background" (in a thread, while
            the stages before them train), "first" (with everything else that the run will need, before it trains;
            dispatches then keep the length that was estimated for them) or "off" (when they are needed).
        population: how runs that may share a program are trained (`run_population`, sweeps): "vmap" (all members at
            once: fills an accelerator that one small batch leaves idle), "map" (one after the other in one program),
            "workers" (one by one, a sweep by several processes) or "auto" (what is fastest of these, timed over a few
            steps); None: "auto" on an accelerator, where it pays, and on a CPU what gives each run its own bits.
        population_chunk: most members in one program; None: 32.

    Raises:
        ValueError: a size below 1, an unknown word.
    """

    steps_per_dispatch: int | None = _exact(None)
    donate: bool = _exact(True)
    eval_batch_size: int = _rounding(500)
    trim_path: str = _rounding("auto")
    trim_programs: int = _rounding(5)
    gram_chunk: int | None = _rounding(None)
    save_every: int | str | None = _exact(None)
    checkpoint_gigabytes: float | None = _exact(None)
    compile_ahead: str = _exact("background")
    population: str | None = _rounding(None)
    population_chunk: int | None = _rounding(None)
    devices: int | None = _rounding(None)
    shard_data: bool = _exact(False)
    micro_batch: int | None = _rounding(None)
    stream: bool | None = _exact(None)

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.at_least(1, eval_batch_size=self.eval_batch_size, trim_programs=self.trim_programs)
        for name in ("steps_per_dispatch", "gram_chunk", "population_chunk", "devices", "micro_batch"):
            if getattr(self, name) is not None:
                _validate.at_least(1, **{name: getattr(self, name)})
        _validate.one_of(PATHS, trim_path=self.trim_path)
        if self.trim_path == "reuse" and self.micro_batch is not None:
            words = "it keeps what a backward pass needs of the whole batch"
            raise Refusal(f"Expected another trim_path than 'reuse' with micro_batch={self.micro_batch}: {words}.")
        _validate.one_of(COMPILE_AHEAD, compile_ahead=self.compile_ahead)
        if self.population is not None:
            _validate.one_of(POPULATIONS, population=self.population)
        if self.checkpoint_gigabytes is not None:
            _validate.positive(checkpoint_gigabytes=self.checkpoint_gigabytes)
        if isinstance(self.save_every, str) and self.save_every.isdecimal():
            object.__setattr__(self, "save_every", int(self.save_every))
        if isinstance(self.save_every, int):
            _validate.at_least(1, save_every=self.save_every)
        elif self.save_every not in (None, "end") and not re.fullmatch(r"\d+(\.\d+)?\s*(s|min|h)", self.save_every):
            raise Refusal(
                f"Expected save_every={self.save_every!r} to be a number of test points, a time such as 90s, 10min or"
                " 2h, or end."
            )

    @classmethod
    def effects(cls) -> dict[str, str]:
        """Field -> "exact" or "rounding"."""
        return {f.name: f.metadata["effect"] for f in dataclasses.fields(cls)}
