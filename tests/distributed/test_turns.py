import threading
import time

from hf_msn.distributed.comm import turns
from hf_msn.distributed.comm.turns import Turns


def _start(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def test_one_at_a_time_in_the_order_of_asking():
    queue, inside, order = Turns(), [], []

    def send(number):
        with queue.turn(lambda: False):
            inside.append(number)
            order.append((number, len(inside)))
            time.sleep(0.03)
            inside.remove(number)

    threads = []
    for number in range(5):
        threads.append(_start(send, number))
        time.sleep(0.01)
    for thread in threads:
        thread.join(10.0)
    assert order == [(number, 1) for number in range(5)]


def test_who_does_not_get_on_is_overtaken_once_for_all(monkeypatch):
    monkeypatch.setattr(turns, "_PATIENCE_SECONDS", 0.2)
    queue, done, stopped = Turns(), threading.Event(), threading.Event()

    def hang():
        with queue.turn(lambda: False):
            stopped.set()
            done.wait(30.0)

    hanging = _start(hang)
    assert stopped.wait(10.0)
    times = []
    for _ in range(3):
        started = time.monotonic()
        with queue.turn(lambda: False):
            times.append(time.monotonic() - started)
    done.set()
    hanging.join(10.0)
    assert times[0] >= 0.2
    assert sum(times[1:]) < times[0]
    assert queue._longest < 0.2  # what was overtaken says nothing of how long a turn takes
    with queue.turn(lambda: False):
        assert len(queue._ahead) == 1


def test_who_gives_up_enters_at_once_and_leaves_the_queue():
    queue, done, stopped = Turns(), threading.Event(), threading.Event()

    def hang():
        with queue.turn(lambda: False):
            stopped.set()
            done.wait(30.0)

    hanging = _start(hang)
    assert stopped.wait(10.0)
    with queue.turn(lambda: True):
        assert not done.is_set()
    assert len(queue._ahead) == 1
    done.set()
    hanging.join(10.0)
    assert queue._ahead == []
