"""Growing the batch instead of decaying the rate (P3 cites it; P4, section 2), beside ordinary decay and neither.

    python experiments/growing.py DATA_DIR [--seeds 10] [--workers 2]

A perceptron with batch norm on 10,000 images of MNIST, 20 epochs. Fixed beforehand: the smallest difference of interest
is 0.1 points of test error; growing and decaying differ where the 95 % interval of the difference, paired by seed,
excludes 0, and are called alike only where it lies within ±0.1.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

import hardjax as hj
from hardjax.cli import output
from hardjax.study import statistics
from hardjax.training import lines
from hardjax.training.setting import prepare

RESULTS = Path(__file__).parent / "results" / "growing.jsonl"
OF_INTEREST = 0.1


def arms(data_dir: str) -> dict[str, hj.TrainConfig]:
    base = hj.TrainConfig(
        dataset="mnist",
        data_dir=data_dir,
        validation=5 / 6,
        model="mlp",
        model_options={"norm": "batch"},
        augmentation=hj.Augmentation(frame=32, place="random"),
        epochs=20,
        batch_size=32,
        optimizer="nesterov",
        learning_rate=0.05,
        weight_decay=1e-4,
        evaluate_train=False,
        test_every=5,
    )
    growing = dataclasses.replace(base, batch_size=128, batch_plan=hj.batch_plan.BatchPlan.growing(32))
    return {"decaying": dataclasses.replace(base, schedule="step"), "growing": growing, "neither": base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = arms(options.data_dir)
    configs = {
        (arm, seed): dataclasses.replace(config, seed=seed)
        for seed in range(options.seeds)
        for arm, config in settings.items()
    }
    swept = hj.sweep(list(configs.values()), output="runs/growing", workers=options.workers)
    RESULTS.unlink(missing_ok=True)
    dataset = hj.data.load("mnist", options.data_dir)
    error = {arm: np.full(options.seeds, np.nan) for arm in settings}
    steps = {}
    for (arm, seed), row in zip(configs, swept.rows, strict=True):
        kept = {name: row[name] for name in ("key", "status", "metrics", "history", "seconds", "versions", "device")}
        lines.append_line(RESULTS, {"arm": arm, "seed": seed, **kept})
        error[arm][seed] = 100 - row["metrics"]["final_test_top1"]
        steps[arm] = prepare(settings[arm], dataset).plan.steps
    found = []
    for arm, values in error.items():
        own, pair = statistics.interval(values), statistics.paired(values, error["decaying"])
        within = abs(pair.low) < OF_INTEREST and abs(pair.high) < OF_INTEREST
        verdict = "-" if arm == "decaying" else "differs" if pair.differs else "alike" if within else "undecided"
        found.append(
            {
                "arm": arm,
                "steps": steps[arm],
                "test error (%)": f"{own.mean:.3f} ± {own.half_width:.3f}",
                "against decaying": "-" if arm == "decaying" else f"{pair.mean:+.3f} ± {pair.half_width:.3f}",
                "verdict": verdict,
            }
        )
    output.table(f"mlp norm=batch on 10,000 images of mnist, {options.seeds} seeds", found)


if __name__ == "__main__":
    main()
