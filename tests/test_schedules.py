"""Schedules against their equations. The golden numbers of the reference are in tests/trainers/test_msn_trainer.py."""

import math

import pytest

from hf_msn.schedules import cosine, linear, warmup_cosine


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_schedules_begin_and_end_at_their_end_points(schedule):
    for start, end in [(0.04, 0.4), (0.996, 1.0), (1e-3, 1e-6), (0.3, 0.3)]:
        assert schedule(0.0, start, end) == pytest.approx(start, rel=1e-12, abs=0)
        assert schedule(1.0, start, end) == pytest.approx(end, rel=1e-12, abs=0)
        assert schedule(0.5, start, end) == pytest.approx((start + end) / 2, rel=1e-12, abs=0)


def test_cosine_is_half_a_wave():
    # cos(pi / 3) = 1 / 2 and cos(pi / 4) = sqrt(1 / 2): a quarter and (1 - sqrt(1 / 2)) / 2 of the way.
    assert cosine(1 / 3, 0.0, 1.0) == pytest.approx(0.25, rel=1e-12)
    assert cosine(1 / 4, 2.0, 4.0) == pytest.approx(2.0 + 2.0 * (1 - math.sqrt(0.5)) / 2, rel=1e-12)


def test_warmup_reaches_the_peak_where_it_ends_and_then_falls():
    def rate(progress):
        return warmup_cosine(progress, warmup=0.2, start=2e-4, peak=1e-3, end=1e-6)

    assert rate(0.0) == 2e-4
    assert rate(0.1) == pytest.approx(6e-4, rel=1e-12)
    assert rate(0.2) == 1e-3
    assert rate(0.6) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-12)
    assert rate(1.0) == pytest.approx(1e-6, rel=1e-9)
    after = [rate(0.2 + 0.01 * step) for step in range(81)]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("progress", "warmup", "expected"),
    [(0.0, 0.0, 1e-3), (1.0, 1.0, 1e-3), (0.5, 1.0, 6e-4), (1.0, 2.0, 6e-4)],
    ids=["no warm-up", "end of a whole one", "half of a whole one", "longer than training"],
)
def test_warmups_of_other_lengths(progress, warmup, expected):
    value = warmup_cosine(progress, warmup=warmup, start=2e-4, peak=1e-3, end=0.0)
    assert value == pytest.approx(expected, rel=1e-12)


def test_a_stretched_horizon_stops_short_of_the_end_value():
    # At the end of training the progress is 1 / 1.25 = 0.8.
    assert linear(1.0 / 1.25, 0.996, 1.0) == pytest.approx(0.9992, rel=1e-12)
    expected = 0.4 + (0.04 - 0.4) * (1 + math.cos(0.8 * math.pi)) / 2
    assert cosine(1.0 / 1.25, 0.04, 0.4) == pytest.approx(expected, rel=1e-12)
    assert expected < 0.37


@pytest.mark.parametrize("progress", [-1e-9, 1 + 1e-9, 17.0, math.nan])
def test_progress_outside_of_training_is_an_error(progress):
    for schedule in (
        lambda: linear(progress, 0.0, 1.0),
        lambda: cosine(progress, 0.0, 1.0),
        lambda: warmup_cosine(progress, warmup=0.1, start=0.0, peak=1.0, end=0.0),
    ):
        with pytest.raises(ValueError, match=r"`progress` .* must be in \[0, 1\], but is .* Divide the step"):
            schedule()


@pytest.mark.parametrize("warmup", [-0.1, math.nan])
def test_a_negative_warmup_is_an_error(warmup):
    with pytest.raises(ValueError, match=f"`warmup` is a part of training and must be >= 0, but is {warmup}"):
        warmup_cosine(0.5, warmup=warmup, start=0.0, peak=1.0, end=0.0)
