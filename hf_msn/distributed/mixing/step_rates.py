"""How many steps a second each rank takes, from the step counts that arrive with its messages."""

import threading
from collections import deque
from collections.abc import Iterable

_WINDOW_SECONDS = 30.0
_MOST_SAMPLES = 100  # of a window
_FEWEST_STEPS = 4  # that an estimate stands on
_MOST_SCALE = 10.0  # a step that is stretched further would not be stable


class StepRates:
    """Estimates over the last 30 seconds. Times are the senders' own: only their differences count.

    Args:
        num_ranks (`int`): Number of ranks.
        window_seconds (`float`, *optional*, defaults to 30): Of an estimate.
    """

    def __init__(self, num_ranks: int, window_seconds: float = _WINDOW_SECONDS):
        self._window = window_seconds
        self._samples: list[deque[tuple[int, float]]] = [deque() for _ in range(num_ranks)]
        self._latest = [-1] * num_ranks
        self._rates: list[float | None] = [None] * num_ranks
        self._lock = threading.Lock()

    def note(self, rank: int, step: int, seconds: float) -> None:
        """`rank` ended its step `step` at `seconds` of its own clock. Steps that are known already change nothing."""
        with self._lock:
            samples = self._samples[rank]
            if step <= self._latest[rank]:
                return
            self._latest[rank] = step
            if len(samples) > 1 and samples[-1][1] - samples[-2][1] < self._window / _MOST_SAMPLES:
                samples.pop()
            samples.append((step, seconds))
            while len(samples) > 2 and seconds - samples[1][1] > self._window:
                samples.popleft()
            steps, elapsed = step - samples[0][0], seconds - samples[0][1]
            if steps >= _FEWEST_STEPS and elapsed > 0.0:
                self._rates[rank] = steps / elapsed

    def pause(self) -> None:
        """What comes next is measured anew: the ranks have waited for one another. The estimates hold until then."""
        with self._lock:
            for samples in self._samples:
                samples.clear()

    def scale(self, rank: int, among: Iterable[int]) -> float:
        """s = mean_j(rate_j) / rate of `rank`, j over `among`; 1 until all are known; from 1/10 to 10."""
        rates, own = [self._rates[j] for j in among], self._rates[rank]
        if own is None or any(rate is None for rate in rates):
            return 1.0
        return min(max(sum(rates) / len(rates) / own, 1.0 / _MOST_SCALE), _MOST_SCALE)
