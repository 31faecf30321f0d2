import numpy as np
import pytest

from hf_msn.finetuning.validation_split import validation_split

LABELS = np.array([7] * 10 + [2] * 5 + [4] * 2)
ROWS = np.arange(17) * 3


@pytest.mark.parametrize(
    ("fraction", "sizes"), [(0.01, (1, 1, 1)), (0.2, (2, 1, 1)), (0.5, (5, 3, 1)), (0.99, (9, 4, 1))]
)
def test_each_class_gives_its_share_at_least_one_and_never_all(fraction, sizes):
    trained, held_out = validation_split(ROWS, LABELS, fraction, seed=0)
    assert sorted([*trained, *held_out]) == ROWS.tolist()
    by_row = dict(zip(ROWS.tolist(), LABELS.tolist()))
    counted = tuple(sum(by_row[row] == number for row in held_out.tolist()) for number in (7, 2, 4))
    assert counted == sizes
    assert held_out.tolist() == sorted(held_out.tolist()) and trained.tolist() == sorted(trained.tolist())


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    order = np.random.default_rng(0).permutation(17)
    first, shuffled = validation_split(ROWS, LABELS, 0.4, 0), validation_split(ROWS[order], LABELS[order], 0.4, 0)
    assert first[1].tolist() == shuffled[1].tolist() and first[0].tolist() == shuffled[0].tolist()
    assert len({tuple(validation_split(ROWS, LABELS, 0.4, seed)[1]) for seed in range(8)}) > 4


def test_nothing_is_held_out_at_0():
    trained, held_out = validation_split(ROWS, LABELS, 0, seed=0)
    assert trained.tolist() == ROWS.tolist() and len(held_out) == 0


def test_a_class_with_a_single_image_is_named_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"1 of 2 classes have a single labelled image \(cat\).*`validation_fraction` to 0"
    ):
        validation_split(np.arange(3), np.array([0, 1, 1]), 0.2, 0, ["cat", "dog"])
