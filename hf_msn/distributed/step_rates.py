"""Estimates of the steps per second of each rank, from the step counts that arrive with its messages."""

from collections import deque
from collections.abc import Iterable

_WINDOW_SECONDS = 30.0
_MAX_SAMPLES = 100  # per window
_MIN_STEPS = 4  # per estimate
_MAX_SCALE = 10.0  # a step that is scaled by more would not be stable


class StepRates:
    """Steps per second over the last 30 seconds. Times are those of the senders' clocks: only differences count."""

    def __init__(self, num_ranks: int, window_seconds: float = _WINDOW_SECONDS):
        self._window = window_seconds
        self._samples: list[deque[tuple[int, float]]] = [deque() for _ in range(num_ranks)]
        self._latest = [-1] * num_ranks
        self._rates: list[float | None] = [None] * num_ranks

    def note(self, rank: int, step: int, seconds: float) -> None:
        """Note that `rank` ended its step `step` at `seconds` on its own clock. Known steps change nothing."""
        samples = self._samples[rank]
        if step <= self._latest[rank]:
            return
        self._latest[rank] = step
        if len(samples) > 1 and samples[-1][1] - samples[-2][1] < self._window / _MAX_SAMPLES:
            samples.pop()
        samples.append((step, seconds))
        while len(samples) > 2 and seconds - samples[1][1] > self._window:
            samples.popleft()
        steps, elapsed = step - samples[0][0], seconds - samples[0][1]
        if steps >= _MIN_STEPS and elapsed > 0.0:
            self._rates[rank] = steps / elapsed

    def pause(self) -> None:
        """Begin new windows, after the ranks have waited for one another. Until then the estimates hold."""
        for samples in self._samples:
            samples.clear()

    def scale(self, rank: int, among: Iterable[int]) -> float:
        """Return s = mean_j(rate_j) / rate of `rank`, j in `among`, within [1/10, 10]; 1 until all are known."""
        rates, own = [self._rates[j] for j in among], self._rates[rank]
        if own is None or any(rate is None for rate in rates):
            return 1.0
        return min(max(sum(rates) / len(rates) / own, 1.0 / _MAX_SCALE), _MAX_SCALE)
