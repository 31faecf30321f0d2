"""Schedules as pure functions of progress, so that a resumed run needs no state to go on where it stopped.

Progress is the part of training that is done, in [0, 1]. To stretch a horizon, as the reference of MSN does by 1.25,
divide the progress by the stretch: the schedule then never reaches its end value.
"""

import math


def linear(progress: float, start: float, end: float) -> float:
    """`start` at progress 0, `end` at progress 1, a straight line between.

    Raises:
        ValueError: If `progress` is outside [0, 1].
    """
    _check_progress(progress)
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """`start` at progress 0, `end` at progress 1, half a cosine wave between: flat at both ends.

    Raises:
        ValueError: If `progress` is outside [0, 1].
    """
    _check_progress(progress)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(progress: float, *, warmup: float, start: float, peak: float, end: float) -> float:
    """A straight line from `start` to `peak` while progress is below `warmup`, then a cosine from `peak` to `end`.

    Args:
        progress (`float`): Part of training that is done, in [0, 1].
        warmup (`float`): Part of training that the warm-up takes, >= 0. Above 1 it does not reach the peak.
        start (`float`): Value at progress 0, if there is a warm-up. The MSN paper starts from 2e-4, not from 0.
        peak (`float`): Value where the warm-up ends.
        end (`float`): Value at progress 1.

    Raises:
        ValueError: If `progress` is outside [0, 1], or `warmup` is below 0.
    """
    _check_progress(progress)
    if not warmup >= 0.0:
        raise ValueError(f"`warmup` is a part of training and must be >= 0, but is {warmup}.")
    if progress < warmup:
        return linear(progress / warmup, start, peak)
    if warmup == 1.0:
        return peak
    return cosine((progress - warmup) / (1.0 - warmup), peak, end)


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(
            f"`progress` is the part of training that is done and must be in [0, 1], but is {progress}. "
            "Divide the step by the total number of steps."
        )
