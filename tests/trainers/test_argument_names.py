"""Errors from below speak of the fields that a user has set; test_paws_trainer.py has those of the support."""

import pytest

from hf_msn.trainers.argument_names import in_terms_of


def test_another_error_is_left_as_it_is():
    error = ValueError("nothing of ours: a shard is a shard, and a mask a mask")
    with pytest.raises(ValueError) as caught, in_terms_of({"mask": "labelled_rows_file", "shard": "support_shard"}):
        raise error
    assert caught.value is error
