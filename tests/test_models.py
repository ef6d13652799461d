import pytest

from hardjax import models


@pytest.mark.parametrize(
    "name, channels, classes, parameters",
    [
        ("mlp", 1, 10, 768_010),
        ("resnet8", 3, 10, 75_290),
        ("resnet20", 3, 10, 269_722),
        ("resnet32", 3, 10, 464_154),
        ("resnet20", 3, 100, 275_572),
    ],
)
def test_parameter_counts_equal_the_published_ones(name, channels, classes, parameters):
    assert models.size_of(models.create(name, num_classes=classes), (32, 32, channels)).parameters == parameters


def test_unknown_names_and_options_offer_the_closest():
    with pytest.raises(ValueError, match="did you mean 'resnet"):
        models.create("resnet21")
    with pytest.raises(ValueError, match="did you mean 'norm'"):
        models.create("resnet8", norms="batch")
