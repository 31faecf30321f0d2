"""Images per second, and the time spent waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ...distributed.collectives import all_reduce_mean


class ThroughputCallback(TrainerCallback):
    """Measure images per second over all ranks, and the seconds that a rank waits for its data loaders.

    A trainer adds each micro-batch to `images`, and enters [`waiting`] while it waits for data and [`paused`] while it
    does anything but train. The first update starts the clock, so that the set-up before it does not count.
    """

    def __init__(self):
        self.images, self.seconds_waited = 0, 0.0
        self._started: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.images, self.seconds_waited, self._started = 0, 0.0, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self._started is None:
            self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time inside to `data_wait_seconds`."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_waited += time.perf_counter() - entered

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the images per second."""
        entered = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - entered

    def measure(self, args) -> dict[str, float]:
        """Return the values since the last call, and start again from 0. All ranks must call it."""
        means = all_reduce_mean(torch.tensor([float(self.images), self.seconds_waited], device=args.device))
        images, waited = means.tolist()
        seconds = max(time.perf_counter() - self._started, 1e-9)
        self.images, self.seconds_waited, self._started = 0, 0.0, time.perf_counter()
        return {"images_per_second": images * args.world_size / seconds, "data_wait_seconds": waited}


class ThroughputProgressCallback(ProgressCallback):
    """Show the progress bar of Trainer, with time left and images per second."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['images_per_second']:.0f} images/s")
