"""Images per second and waiting for data, in the log and in the progress bar."""

import time

import pytest
from short_runs import logged, make_trainer

from hf_msn import MultiViewCollator
from hf_msn.trainers.callbacks import throughput
from hf_msn.trainers.callbacks.throughput import ThroughputCallback, ThroughputProgressCallback


class SlowCollator(MultiViewCollator):
    def __call__(self, items):
        time.sleep(0.05)
        return super().__call__(items)


def test_waiting_for_data_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=3, save_strategy="no")
    trainer.data_collator = SlowCollator()
    trainer.train()
    waited = logged(trainer, "data_wait_seconds")
    # The loader reads one batch ahead: six to eight batches, each waited for once.
    assert sorted(waited) == [3, 6]
    assert sum(waited.values()) >= 0.3 and min(waited.values()) >= 0.1


def test_images_over_seconds_since_the_first_update(monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    callback, args = ThroughputCallback(), make_trainer(tmp_path).args
    callback.on_train_begin(args, None, None)
    clock[0] += 50  # set-up
    with callback.waiting():
        clock[0] += 2
    callback.on_step_begin(args, None, None)
    callback.images += 12
    clock[0] += 3
    with callback.paused():
        clock[0] += 7
    assert callback.measure(args) == pytest.approx({"images_per_second": 4.0, "data_wait_seconds": 2.0})
    callback.images += 12
    clock[0] += 6
    assert callback.measure(args) == pytest.approx({"images_per_second": 2.0, "data_wait_seconds": 0.0})


def test_the_progress_bar_shows_images_per_second(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, disable_tqdm=False, save_strategy="no")
    (bar,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ThroughputProgressCallback)]
    shown, on_log = [], bar.on_log

    def watched(*args, **kwargs):
        on_log(*args, **kwargs)
        shown.append(bar.training_bar.postfix)

    bar.on_log = watched
    trainer.train()
    assert shown[:4] == [f"{rate:.0f} images/s" for rate in logged(trainer, "images_per_second").values()]
