"""`hardjax sweep` as a user meets it: which cells its options make, what it prints, how it ends."""

import json

import pytest
from sweeps import cells, row

import hardjax as hj
from hardjax.cli import main, prepare
from hardjax.cli.sweep_screen import Screen
from hardjax.study import sweep as sweeping
from hardjax.study.sweep import Progress, Sweep
from hardjax.study.sweep_rows import read_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)


def command(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


@pytest.fixture
def asked(monkeypatch):
    """What the library is asked for, in place of doing it."""
    found = {"result": Sweep(())}

    def sweep(configs, **more):
        found.update(more, configs=configs)
        return found["result"]

    monkeypatch.setattr(sweeping, "sweep", sweep)
    return found


def _values(asked, *names):
    return [tuple(getattr(config, name) for name in names) for config in asked["configs"]]


def test_the_grid_of_the_command_line(asked):
    words = "--dataset digits --model mlp --batch-sizes 8 32 --base-learning-rates 2^-12 0.25 --seeds 2 --seed 5"
    assert command("sweep", *words.split(), "--epochs", 3, "--workers", 2, "--max-hours", 1.5, "--output", "out") == 0
    assert _values(asked, "batch_size", "base_learning_rate", "seed") == [
        (size, rate, seed) for size in (8, 32) for rate in (2**-12, 0.25) for seed in (5, 6)
    ]
    assert {(config.epochs, config.model) for config in asked["configs"]} == {(3, "mlp")}
    assert (asked["workers"], asked["max_hours"], str(asked["output"])) == (2, 1.5, "out")
    assert command("sweep") == 0
    assert (asked["workers"], asked["max_hours"], len(asked["configs"])) == ("auto", None, 1)


def test_every_axis(asked):
    assert command("sweep", "--models", "mlp", "resnet8", "--augmentations", "none", "standard") == 0
    assert [(model, kind.pad) for model, kind in _values(asked, "model", "augmentation")] == [
        (model, pad) for model in ("mlp", "resnet8") for pad in (0, None)
    ]
    words = "--schedule step --warmups 0 0.05 --selections all-batches hard-batches:0.5 --learning-rates 2^-3"
    assert command("sweep", *words.split()) == 0
    hard = hj.selection.HardBatches(0.5)
    assert [
        (one.kind, one.warmup, kind, rate)
        for one, kind, rate in _values(asked, "schedule", "selection", "learning_rate")
    ] == [("step", warmup, kind, 0.125) for warmup in (0, 0.05) for kind in (hj.selection.AllBatches(), hard)]
    assert command("sweep", "--batch-plans", "s32-to-512", "32-64") == 0
    assert [plan.text for (plan,) in _values(asked, "batch_plan")] == ["32-64-128-256-512", "32-64"]
    options = "--model-option widths=[4] --model-options norm=batch norm=none dropout=null dropout=0.5"
    assert command("sweep", *options.split()) == 0
    assert [found for (found,) in _values(asked, "model_options")] == [
        {"widths": [4], "norm": norm} | more for norm in ("batch", "none") for more in ({}, {"dropout": 0.5})
    ]
    words = "--model-option norm=batch --norm-momentum 0.99 --model-options dropout=0 dropout=0.5"
    assert command("sweep", *words.split(), "--norm-statistics", "re-estimated") == 0
    assert _values(asked, "norm_statistics") == [("re-estimated",)] * 2
    assert [found for (found,) in _values(asked, "model_options")] == [
        {"norm": "batch", "norm_momentum": 0.99, "dropout": dropout} for dropout in (0, 0.5)
    ]


def test_sub_batches_that_do_not_divide_a_batch_are_left_out_and_said(asked, capsys):
    words = "--batch-sizes 4 8 --model-option norm=batch --model-options norm_batch_size=8 norm_batch_size=2"
    assert command("sweep", *words.split()) == 0
    assert [(config.batch_size, config.model_options["norm_batch_size"]) for config in asked["configs"]] == [
        (8, 8),
        (4, 2),
        (8, 2),
    ]
    assert "1 cell is left out" in capsys.readouterr().err
    assert command("sweep", "--batch-size", 4, "--model-options", "norm_batch_size=8") == 2


@pytest.mark.parametrize(
    "words, said",
    [
        ("--batch-sizes 8 --batch-size 16", "Give --batch-size or --batch-sizes, not both"),
        ("--base-learning-rates 1 --learning-rates 1", "Give --learning-rates or --base-learning-rates"),
        ("--base-learning-rates 1 --learning-rate 1", "not both"),
        ("--models mlp --model resnet8", "Give --model or --models"),
        ("--batch-plans 32-64 --batch-sizes 8", "Give --batch-plans or --batch-sizes"),
        ("--batch-sizes 8 --batch-size 128", "Give --batch-size or --batch-sizes"),
        ("--models mlp --model mlp", "Give --model or --models"),
        ("--batch-sizes 8 --batch-plan 32-64", "Give --batch-plan or --batch-sizes"),
        ("--batch-plans 16-32 --batch-plan 32-64", "Give --batch-plan or --batch-plans"),
        ("--batch-plans 16-32 --batch-size 8", "Give --batch-size or --batch-plans"),
        ("--base-learning-rates 1 --base_learning_rate=1", "Give --base-learning-rate or --base-learning-rates"),
        ("--learning-rates 1 --base-learning-rate 1", "Give --base-learning-rate or --learning-rates"),
        ("--schedule step --warmup 0.1 --warmups 0 0.05", "Give --warmup or --warmups"),
        ("--selection hard-batches --selections all-batches", "Give --selection or --selections"),
        ("--selection hard-batches --delta 0.3 --selections hard-batches", "or --selections, not both"),
        ("--no-fixed --selections hard-batches", "Give --fixed or --selections"),
        ("--augmentation standard --augmentations none", "Give --augmentation or --augmentations"),
        ("--model-option widths=[4] --model-options widths=[8]", "Give widths in --model-option or in --model-options"),
        ("--rates-from a --base-learning-rates 1", "Give --base-learning-rates or --rates-from, not both"),
        ("--rates-from a --learning-rate 1", "Give --learning-rate or --rates-from, not both"),
        ("--norm-momentum 0.5 --model-options norm_momentum=0.9", "Give norm_momentum in --model-option or"),
        ("--norm-momentum 0.5 --model-option norm_momentum=0.9", "model option 'norm_momentum' once, got it twice"),
        ("--norm-momentum many", "--norm-momentum 'many' to be a number"),
        ("--model-option norm=batch --model-options norm=null", "Give norm in --model-option or in --model-options"),
        ("--base-learning-rates 2^x", "to be a number"),
        ("--base-learning-rates 2^-8^2", "to be a number"),
        ("--base-learning-rates 2^9999", "to be a number"),
        ("--base-learning-rates 8 8", "is there twice"),
        ("--seeds 0", "at least 1: it is how many"),
        ("--workers many", "--workers 'many' to be auto or a number"),
        ("--selections hard-batches:x", "hard-batches:0.5"),
        ("--selections hard-baches", "did you mean 'hard-batches'"),
        ("--augmentations standart", "did you mean 'standard'"),
        ("--model-options norm", "key=value"),
        ("--plot nowhere", "No sweep in 'nowhere'"),
    ],
)
def test_what_is_refused_is_one_line(asked, capsys, words, said):
    assert command("sweep", *words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "configs" not in asked


@pytest.mark.parametrize(
    "option",
    ["batch-sizes", "base-learning-rates", "learning-rates", "models", "model-options", "warmups", "selections"],
)
def test_an_axis_without_a_value_is_refused(asked, capsys, option):
    assert command("sweep", f"--{option}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{option}" in line and "configs" not in asked


def test_how_it_ends(asked, capsys, monkeypatch):
    from hardjax.cli import sweep

    monkeypatch.setattr(sweep, "_pictures", lambda folder: None)
    (done, *others) = [row(cell) for cell in cells(8)]
    failed = [one | {"status": "failed", "reason": "made up", "metrics": {}} for one in others]
    for result, code in (
        (Sweep((done,)), 0),
        (Sweep((done | {"status": "diverged"},)), 0),
        (Sweep((done,), left=2), 0),
        (Sweep((done, *failed)), 1),
        (Sweep((done, *failed), left=2, signal="SIGTERM"), 143),
        (Sweep((), left=2, signal="SIGINT"), 130),
    ):
        asked["result"] = result
        assert command("sweep") == code
    out, err = capsys.readouterr()
    assert "8 of 8 cells have a row (1 done, 7 failed)" in out and "1 of 1 cells have a row (1 diverged)" in out
    assert "failed: mlp, batch 128, rate 0.005, seed 1: made up" in err and "and 2 more, see runs/sweep" in err
    assert "2 cells are left; the same command goes on" in err


def test_the_pictures_are_drawn_from_the_rows_alone(tmp_path, capsys):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.jsonl").write_text(
        "".join(json.dumps(row(cell, 80 + cell.config.seed)) + "\n" for cell in cells(3))
    )
    assert command("sweep", "--plot", folder) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "best.png",
        "curves.png",
        "performance.png",
        "reliable.png",
    ]
    out = " ".join(capsys.readouterr().out.split())
    assert "mlp on digits" in out and "81.00 │ 3 │ 80.00 to 82.00 │ 0.005 to 0.005 (1)" in out


def test_sub_batches_have_a_picture_of_their_own(tmp_path, capsys):
    folder = tmp_path / "sweep"
    folder.mkdir()
    parts = [cells(1, model_options={"norm": "batch", "norm_batch_size": part})[0] for part in (4, 8)]
    (folder / "sweep.jsonl").write_text("".join(json.dumps(row(cell, 80)) + "\n" for cell in parts))
    assert command("sweep", "--plot", folder) == 0
    assert (folder / "norm_batches.png").stat().st_size > 2_000 and "norm_batches.png" in capsys.readouterr().out


def test_rates_of_another_sweep_are_asked_for_and_said(asked, capsys):
    choice = {"sweep": "runs/first", "grid": "mlp on digits", "batches": "8", "base_learning_rate": 0.25}
    choice |= {"chosen_by": "median_validation_top1", "value": 81.25, "seeds": 3, "rates": 6}
    asked["result"] = Sweep((), left=1)
    assert command("sweep", "--rates-from", "runs/first", "--batch-sizes", 8) == 0
    assert asked["rates_from"] == "runs/first" and _values(asked, "base_learning_rate") == [(None,)]
    from hardjax.cli.sweep_screen import tell_rates

    tell_rates([choice, None, dict(choice)])
    (*_, line) = capsys.readouterr().out.splitlines()
    assert line == (
        "batch 8: base rate 0.25 of runs/first (mlp on digits), the best of 6 by validation: 81.25 % over 3 seeds"
    )


def test_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter((0.0, 10.0, 31.0, 32.0))
    monkeypatch.setattr("hardjax.cli.sweep_screen.time.monotonic", lambda: next(clock))
    with Screen(quiet=False) as screen:
        screen(Progress(0, 8, 0, 0, 2, float("nan")))
        screen(Progress(1, 8, 0, 0, 2, 100.0))
        screen(Progress(2, 8, 1, 0, 2, 3700.0))
        screen(Progress(8, 8, 1, 2, 0, 0.0))
    assert capsys.readouterr().err.splitlines() == [
        "sweep: 0 of 8 cells done, 0 failed, 2 under way, time left not known yet",
        "sweep: 2 of 8 cells done, 1 diverged, 0 failed, 2 under way, about 1:01:40 left",
        "sweep: 8 of 8 cells done, 1 diverged, 2 failed",
    ]
    with Screen(quiet=True) as screen:
        screen(Progress(0, 8, 0, 0, 2, float("nan")))
    assert capsys.readouterr().err == ""


@pytest.mark.ci
def test_a_dry_run_trains_nothing_and_counts_what_would_be_compiled(tmp_path, capsys):
    words = "--model-option widths=[7] --epochs 2 --batch-sizes 16 64 --base-learning-rates 2^-8 2^-6 --workers 1"
    assert command("sweep", *words.split(), "--dry-run", "--output", tmp_path / "sweep") == 0
    out = capsys.readouterr().out
    assert "4 cells left, 2 shapes to compile" in out and "with 1 worker\n" in out and "4 cells, 0 of them done" in out
    cells = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[1:4]] for line in cells] == [
        ["batch 16", "2", "180"],
        ["batch 64", "2", "46"],
    ]
    assert all(float(line[4]) > 0 and int(line[5]) == 1 and int(line[6]) > 0 for line in cells)
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def planned(monkeypatch):
    """What is tried by a dry run, in place of trying it."""
    from hardjax.study import crew
    from hardjax.study.estimate import Estimate

    found = []

    def estimates(cells, performance, places):
        found[:] = cells
        return [
            "Expected less." if cell.config.batch_size == 64 else Estimate(1, 2, 1.0, 10**6, 90, 0.001, 0.1)
            for cell in cells
        ]

    monkeypatch.setattr(crew, "estimates", estimates)
    return found


def test_a_dry_run_counts_what_would_be_trained_again_and_what_would_fail(planned, tmp_path, capsys):
    from hardjax.data.augment import Augmentation
    from hardjax.study.work import Trainer

    (tmp_path / "hardjax.json").write_text("")
    plain = Augmentation(pad=0, flip=False)
    base = hj.TrainConfig(model_options={"widths": [4]}, epochs=1, optimizer="sgd", augmentation=plain)
    first, second = (Trainer().cell(config) for config in hj.grid(base, seed=range(2)))
    rows = [row(first), row(second, status="failed")]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = "--model-option widths=[4] --epochs 1 --optimizer sgd --seeds 2 --workers 1 --dry-run"
    words = (*words.split(), "--output")
    for more, left in (((), 0), (("--retry-failed",), 1), (("--overwrite",), 2)):
        assert command("sweep", *words, tmp_path, *more) == 0
        assert f"{left} cell{'' if left == 1 else 's'} left" in capsys.readouterr().out
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 2
    assert command("sweep", *words, tmp_path / "new", "--batch-sizes", 64, 128) == 0
    out, err = capsys.readouterr()
    assert [cell.config.batch_size for cell in planned] == [64, 128] and "1 shape to compile" in out
    assert "would fail: 2 cells of mlp widths=[4] on digits, batch 64: Expected less." in err


@pytest.mark.ci
def test_what_a_network_prints_is_no_part_of_a_plan(tmp_path, capfd):
    network = tmp_path / "loud.py"
    network.write_text(
        "import flax.linen as nn\n"
        "class Net(nn.Module):\n"
        "    width: int = 4\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train):\n"
        "        print('loud')\n"
        "        return nn.Dense(10)(nn.Dense(self.width)(x.reshape(len(x), -1)))\n"
    )
    words = ("--model", f"{network}:Net", "--epochs", 1, "--workers", 1, "--dry-run", "--output", tmp_path / "sweep")
    assert command("sweep", *words) == 0
    assert "1 cell left, 1 shape to compile" in capfd.readouterr().out


@pytest.mark.ci
def test_a_sweep_of_workers_whose_cells_fail_ends_with_1(tmp_path, capfd):
    words = "--model-option widths=[4] --epochs 1 --workers 1 --batch-sizes 512 2048 --quiet"
    wrong = ("--model-options", "norm=nun", "--output", tmp_path / "wrong")
    assert command("sweep", *words.split(), *wrong) == 2  # a word that no network takes
    assert not (tmp_path / "wrong").exists()
    right = ("--model-options", "norm=none", "norm=batch", "--output", tmp_path / "sweep")
    assert command("sweep", *words.split(), *right) == 1
    assert sorted(one["status"] for one in read_rows(tmp_path / "sweep")) == ["done", "done", "failed", "failed"]
    err = capfd.readouterr().err
    assert "at most the 1437 training samples" in err and "Traceback" not in err
