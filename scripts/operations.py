"""Multiply-adds of the networks of all experiments, which the prices of `hardjax table` go by.

python scripts/operations.py     writes experiments/operations.json
"""

import argparse
import json
from pathlib import Path

from hardjax.study import experiments
from hardjax.study.experiments_prices import FILE, all_operations

FOLDER = Path(__file__).parents[1] / "experiments"

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = all_operations(experiments.load(FOLDER).values())
    (FOLDER / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} networks written")
