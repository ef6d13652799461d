"""Spectra of per-sample gradients (P3): Gram matrices, and the measures of their eigenvalues."""

from hardjax.fisher.gram import METHODS, ROWS, coverage, gram, jacobian, make_gram
from hardjax.fisher.measures import (
    Measures,
    NoiseScale,
    Trajectory,
    eigenvalues,
    measures,
    noise_scale,
    sensitivity,
    trajectory,
)
from hardjax.fisher.memory import LayerPlan, plan
from hardjax.fisher.observe import FisherMeasure

__all__ = [
    "METHODS",
    "ROWS",
    "FisherMeasure",
    "LayerPlan",
    "Measures",
    "NoiseScale",
    "Trajectory",
    "coverage",
    "eigenvalues",
    "gram",
    "jacobian",
    "make_gram",
    "measures",
    "noise_scale",
    "plan",
    "sensitivity",
    "trajectory",
]
