"""What a test point says of a run: whether any step could bring it back."""

import types

import numpy as np
import pytest

from hardjax.training.points import is_lost

NAN = float("nan")
LOST = {
    "train_loss": NAN,
    "full_train_loss": NAN,
    "validation_loss": NAN,
    "test_loss": NAN,
    "full_train_top1": NAN,  # not evaluated
    "validation_top1": 0.0,
    "test_top1": 0.0,
}


def _state(*values):
    return types.SimpleNamespace(params={"kernel": np.ones(3, np.float32), "bias": np.array(values, np.float32)})


@pytest.mark.parametrize(
    "changed, values, lost",
    [
        ({}, [NAN, 1.0], True),
        ({"test_loss": float("inf")}, [NAN, 1.0], True),
        ({}, [1.0, 1.0], False),  # the update of its last step was skipped
        ({"test_loss": 2.0}, [-np.inf, 1.0], False),  # behind minus infinity a rectifier is 0
        ({"train_loss": 2.0}, [NAN, 1.0], False),
        ({"test_top1": 3.0}, [NAN, 1.0], False),  # of some samples the loss is a number
        ({"validation_top1": 3.0}, [NAN, 1.0], False),
        ({"full_train_top1": 3.0}, [NAN, 1.0], False),
        ({"test_top1": NAN}, [NAN, 1.0], False),  # labels are values: of single samples nothing is known
    ],
)
def test_a_run_is_lost_where_neither_parameters_nor_losses_are_numbers(changed, values, lost):
    assert is_lost(LOST | changed, _state(*values)) is lost
