"""Errors from below speak of the fields that a user has set."""

import numpy as np
import pytest

from hf_msn.data.samplers import ClassStratifiedSampler
from hf_msn.trainers.argument_names import SUPPORT_FIELDS, in_terms_of


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"world_size": 2}, r"divisible by the 2 ranks with support_shard='classes'.* support_shard='images'"),
        (
            {"on_small_class": "raise"},
            r"`global_support_images_per_class` = 4 .* support_on_small_class='repeat'",
        ),
    ],
    ids=str,
)
def test_the_sampler_is_refused_in_terms_of_the_training_arguments(settings, message):
    settings = {"global_images_per_class": 4, "rank": 0, "world_size": 1, **settings}
    with pytest.raises(ValueError, match=message) as caught, in_terms_of(SUPPORT_FIELDS):
        ClassStratifiedSampler(np.array([0, 1, 2]), **settings)
    assert "`global_classes`" not in str(caught.value) and " shard=" not in str(caught.value)


def test_another_error_is_left_as_it_is():
    error = ValueError("nothing of ours: a shard is a shard, and a mask a mask")
    with pytest.raises(ValueError) as caught, in_terms_of({"mask": "labelled_rows_file", "shard": "support_shard"}):
        raise error
    assert caught.value is error
