"""A batch size that follows the noise scale, beside fixed sizes, plans, and its own sequence replayed open loop.

    python experiments/controlled.py DATA_DIR [--seeds 5]     # goes on where it was interrupted

A perceptron with group norm (under batch norm samples of a batch are not independent, and their noise scale means
nothing: `results/controlled_batch_norm.jsonl` are runs with it, from before that was refused) on 10,000 images of
MNIST, 20 epochs. The controller decides every 2 epochs between 16 and 256. What it did with each seed is trained
again as a plan with another seed: if that does as well, it is the sequence and not the feedback. Fixed beforehand:
arms differ from the controller only where the 95 % interval of the difference in test error, paired by seed, excludes
0 (** by Holm's correction too); the best fixed size and the best plan are chosen by looking, which leans against the
controller. Equal epochs: errors at the end. Equal time: errors at the last test point within the training seconds of
the fastest arm (median over seeds); programs are compiled before.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan, replayed
from hardjax.cli import output
from hardjax.study import statistics
from hardjax.training import lines

RESULTS = Path(__file__).parent / "results" / "controlled.jsonl"
EPOCHS = 20
CONTROLLER = "controlled:start=32,least=16,most=256,every=2"
SIZES, PLANS = ("16", "32", "64", "128", "256"), ("s16-to-256", "s256-to-16")
CLOSED, OPEN = "controller", "its sequence, another seed"


def base(data_dir: str) -> hj.TrainConfig:
    return hj.TrainConfig(
        dataset="mnist",
        data_dir=data_dir,
        validation=5 / 6,
        model="mlp",
        model_options={"norm": "group"},
        augmentation=hj.Augmentation(frame=32, place="random"),
        epochs=EPOCHS,
        optimizer="nesterov",
        learning_rate=0.05,
        weight_decay=1e-4,
        schedule="step",
        measure=hj.fisher.FisherMeasure(every=20),
        evaluate_train=False,
    )


def rows(config: hj.TrainConfig, dataset: hj.data.Dataset, seed: int) -> Iterator[dict[str, Any]]:
    """Of one seed; the open loop comes after the closed one that it repeats."""
    found = trained(config, dataset, CLOSED, BatchPlan(CONTROLLER), seed)
    yield found
    yield trained(config, dataset, OPEN, replayed(found["decisions"]), seed + 1000)
    for text in (*SIZES, *PLANS):
        yield trained(config, dataset, text, BatchPlan(text), seed)


def trained(config: hj.TrainConfig, dataset: hj.data.Dataset, arm: str, plan: BatchPlan, seed: int) -> dict[str, Any]:
    config = dataclasses.replace(config, batch_plan=plan, seed=seed)
    result = hj.run(config, dataset=dataset, progress=False)
    history = {name: result.history[name].tolist() for name in ("epoch", "seconds", "test_top1", "batch_size")}
    kept = {name: result.summary[name] for name in ("backprops", "train_seconds", "device", "versions")}
    return {"arm": arm, "plan": plan.text, "seed": seed % 1000, "decisions": result.decisions, **history, **kept}


def tell(found: list[dict[str, Any]]) -> None:
    arms = list(dict.fromkeys(row["arm"] for row in found))
    of = {arm: {row["seed"]: row for row in found if row["arm"] == arm} for arm in arms}
    seconds = {arm: float(np.median([row["train_seconds"] for row in of[arm].values()])) for arm in arms}
    limit = min(seconds.values())
    seeds = sorted(set.intersection(*(set(one) for one in of.values())))
    end = {arm: [100 - of[arm][seed]["test_top1"][-1] for seed in seeds] for arm in arms}
    early = {arm: [_error_at(of[arm][seed], limit) for seed in seeds] for arm in arms}
    others = [arm for arm in arms if arm != CLOSED]
    pairs = [[statistics.paired(errors[CLOSED], errors[arm]) for errors in (end, early)] for arm in others]
    held = statistics.holm([pair.p_value for both in pairs for pair in both]).reshape(-1, 2)
    table = []
    for arm in arms:
        line: dict[str, Any] = {"arm": arm, "steps": next(iter(of[arm].values()))["backprops"], "seconds": seconds[arm]}
        line["test error (%)"] = f"{np.mean(end[arm]):.3f}"
        line[f"within {limit:.3g} s"] = f"{np.mean(early[arm]):.3f}"
        for place, name in enumerate(("controller minus it", "within the time")):
            if arm == CLOSED:
                line[name] = "-"
                continue
            pair, holds = pairs[others.index(arm)][place], held[others.index(arm)][place]
            line[name] = f"{pair.mean:+.3f} ± {pair.half_width:.3f} {'**' if holds else '*' * pair.differs}".strip()
        table.append(line)
    output.table(f"mlp norm=group on 10,000 images of mnist, {EPOCHS} epochs, {len(seeds)} seeds", table)
    for seed, row in sorted(of[CLOSED].items()):
        print(f"seed {seed}: {row['plan']} became {'-'.join(str(int(size)) for size in row['batch_size'][::2])}")


def _error_at(row: dict[str, Any], limit: float) -> float:
    """At the last test point within the time; of nothing before the first."""
    within = [top1 for second, top1 in zip(row["seconds"], row["test_top1"], strict=True) if second <= limit]
    return 100 - within[-1] if within else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    config = base(options.data_dir)
    dataset = hj.data.load("mnist", options.data_dir)
    found = lines.read_lines(RESULTS) if RESULTS.exists() else []
    counts = {seed: sum(row["seed"] == seed for row in found) for seed in range(options.seeds)}
    # Every size once beforehand, or the arm that comes first would pay for the compiling in its time.
    trained(config, dataset, "warm", BatchPlan("-".join((*SIZES, *SIZES[::-1])) + ";every=2"), 999)
    for seed in range(options.seeds):
        if counts[seed] == len((CLOSED, OPEN, *SIZES, *PLANS)):
            continue
        found = [row for row in found if row["seed"] != seed]
        for row in rows(config, dataset, seed):
            found.append(row)
            print(f"{row['arm']:>28} seed {seed}: {100 - row['test_top1'][-1]:.2f} %", flush=True)
        RESULTS.unlink(missing_ok=True)
        for row in found:  # whole seeds alone: they are compared with each other
            lines.append_line(RESULTS, row)
    tell(found)


if __name__ == "__main__":
    main()
