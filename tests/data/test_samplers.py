import itertools
import math
from collections import Counter

import numpy as np
import pytest

from hf_msn.data.samplers import ClassStratifiedSampler

# classes 3, 7, 20 and 41 with 5, 2, 9 and 3 images, in no order
LABELS = [20, 3, 41, 20, 7, 3, 20, 20, 41, 3, 20, 3, 20, 7, 20, 3, 41, 20, 20]


def _sampler(labels=LABELS, **settings) -> ClassStratifiedSampler:
    return ClassStratifiedSampler(labels, **{"global_images_per_class": 2, "rank": 0, "world_size": 1, **settings})


def _drawn(sampler: ClassStratifiedSampler, step: int, labels=LABELS) -> dict[int, Counter]:
    """Count each position of each class in the batch."""
    drawn = {}
    for position in sampler.batch(step):
        drawn.setdefault(labels[position], Counter())[position] += 1
    return drawn


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_each_step_draws_c_classes_with_k_different_images_each_and_each_cycle_all_classes(classes):
    sampler, steps = _sampler(global_classes=classes), math.ceil(4 / classes)
    orders = []
    for cycle in range(20):
        drawn = [_drawn(sampler, cycle * steps + turn) for turn in range(steps)]
        assert all(len(of_step) == classes for of_step in drawn)
        assert all(sorted(images.values()) == [1, 1] for of_step in drawn for images in of_step.values())
        assert set(itertools.chain(*drawn)) == set(LABELS)
        orders.append(tuple(map(tuple, drawn)))
    assert len(set(orders)) > 5  # an order of its own for each cycle


def test_classes_and_images_are_drawn_equally_often_whatever_their_number():
    sampler, steps = _sampler(global_classes=2, seed=3), 1500
    counts = Counter(position for step in range(steps) for position in sampler.batch(step))
    by_class = Counter()
    for position, count in counts.items():
        by_class[LABELS[position]] += count
    sizes = Counter(LABELS)
    for number, size in sizes.items():
        # a class is in a step or not: binomial; each time it gives 2 of its images
        assert abs(by_class[number] / 2 - steps / 2) < 5 * math.sqrt(steps / 4)
        share = 2 / 4 * 2 / size
        for position in np.flatnonzero(np.array(LABELS) == number):
            assert abs(counts[position] - steps * share) < 5 * math.sqrt(steps * share * (1 - share))


def test_small_class_repeats_all_its_images_equally():
    sampler = _sampler(global_images_per_class=8)
    once_more = Counter()
    for step in range(300):
        drawn = _drawn(sampler, step)
        assert sorted(drawn[7].values()) == [4, 4]
        assert sorted(drawn[3].values()) == [1, 1, 2, 2, 2]
        assert sorted(drawn[41].values()) == [2, 3, 3]
        assert sorted(drawn[20].values()) == [1] * 8
        once_more.update(position for position, count in drawn[3].items() if count == 2)
    assert len(once_more) == 5
    assert all(abs(count - 180) < 5 * math.sqrt(300 * 0.6 * 0.4) for count in once_more.values())


@pytest.mark.parametrize("shard", ["classes", "images"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_draw_the_same_as_one_rank(shard, world_size):
    settings = {"global_classes": 4, "global_images_per_class": 4, "seed": 9}
    alone = _sampler(**settings)
    ranks = [_sampler(**settings, shard=shard, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, 77):
        whole = dict(zip(alone.places.tolist(), alone.batch(step)))
        assert sorted(whole) == list(range(16))
        parts = [dict(zip(rank.places.tolist(), rank.batch(step))) for rank in ranks]
        assert sum(len(part) for part in parts) == 16
        assert {place: row for part in parts for place, row in part.items()} == whole
        for rank in ranks:
            drawn = _drawn(rank, step)
            per_rank = (4 // world_size, 4) if shard == "classes" else (4, 4 // world_size)
            assert (len(drawn), {sum(images.values()) for images in drawn.values()}) == (per_rank[0], {per_rank[1]})


def test_draws_are_a_function_of_seed_and_step():
    first, again, other = _sampler(seed=1), _sampler(seed=1), _sampler(seed=2)
    _ = [again.batch(step) for step in (40, 3)]
    assert first.batch(5) == again.batch(5) == list(itertools.islice(first, 6))[5]
    assert first.batch(5) != first.batch(6)
    assert first.batch(5) != other.batch(5)


def test_draws_are_the_same_on_every_machine():
    sampler = ClassStratifiedSampler(np.repeat([2, 4, 9], 5), global_classes=2, global_images_per_class=2, seed=0)
    assert [sampler.batch(0), sampler.batch(1)] == [[0, 1, 12, 13], [6, 5, 0, 3]]


def test_resumed_sampler_continues():
    whole = list(_sampler(num_steps=9))
    assert list(_sampler(num_steps=5, start_step=4)) == whole[4:]
    assert len(_sampler(num_steps=5, start_step=4)) == 5
    endless = _sampler(start_step=4)
    assert list(itertools.islice(endless, 5)) == whole[4:]
    assert list(itertools.islice(endless, 5)) == whole[4:]


def test_description_states_the_global_support():
    labels = np.repeat(np.arange(1000), [5 + number % 16 for number in range(1000)])
    sampler = ClassStratifiedSampler(labels, global_classes=960, global_images_per_class=6, rank=0, world_size=4)
    text = sampler.describe(views_per_image=2)
    for numbers in ("960 classes x 6 images x 2 views = 11520", "4 ranks, 240 classes x 6 images x 2 views = 2880"):
        assert numbers in text
    assert "12468 of 1000 classes, 5 to 20 per class" in text and "fewer than 6: 63" in text


def test_small_classes_raise_on_request():
    with pytest.raises(ValueError, match="1 have fewer: 7 has 2"):
        _sampler(global_images_per_class=3, on_small_class="raise")
    with pytest.raises(ValueError, match=r"8 have fewer: 0 has 1, 1 has 1, 2 has 1, 3 has 1, 4 has 1, \.\."):
        _sampler(range(8), on_small_class="raise")
    assert len(_sampler(global_images_per_class=2, on_small_class="raise").batch(0)) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_classes": 0}, "`global_classes` .* but is 0"),
        ({"global_classes": 5}, "`global_classes` .* 4, .* but is 5"),
        ({"global_images_per_class": 0}, "`global_images_per_class` .* >= 1, but is 0"),
        ({"shard": "rows"}, "`shard` .* but is 'rows'"),
        ({"on_small_class": "skip"}, "`on_small_class` .* but is 'skip'"),
        ({"seed": -1}, "`seed` .* >= 0, but is -1"),
        ({"global_classes": 3, "world_size": 2}, "`global_classes` .* 2 ranks .* but is 3. Use 2"),
        ({"world_size": 3}, "`global_classes` .* 3 ranks .* but is 4. Use 3"),
        (
            {"shard": "images", "global_images_per_class": 3, "world_size": 4},
            "`global_images_per_class` .* 4 ranks .* but is 3. Use 4",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _sampler(**settings)
