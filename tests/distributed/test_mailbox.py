"""The mailbox between real ranks: order, wholeness, sums that lose nothing, and peers that leave, die or stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from lost_ranks import all_pids, run_ranks_that_are_left

import hf_msn
from hf_msn.distributed.comm.connection import Turns
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.comm.mailbox import Mailbox

SIZES = [7, 3]
LAST = 99  # kind of the last message of a stage
BIG = 4_000_000  # more than a socket holds
NUM_VALUES = 600


def full(value, dtype=torch.float64):
    return [torch.full((size,), float(value), dtype=dtype) for size in SIZES]


def until(predicate, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def drain(mailbox, peers):
    """All messages that the peers have posted before they drain as often as this rank."""
    drained = vars(mailbox).setdefault("drained", {peer: [0, 0] for peer in range(mailbox.size)})  # here, there
    for peer in peers:
        drained[peer][0] += 1
        mailbox.post(peer, LAST)
    messages, deadline = [], time.monotonic() + 20.0
    while missing := [peer for peer in peers if drained[peer][1] < drained[peer][0]]:
        assert time.monotonic() < deadline, f"{missing} did not drain"
        for message in mailbox.collect(0.2):
            if message.kind == LAST:
                drained[message.sender][1] += 1
            else:
                messages.append(message)
    return messages


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hf_msn mailbox")]


def _exchange_plain_messages(rank):
    others = [peer for peer in range(3) if peer != rank]
    mailbox = Mailbox(full(0), num_numbers=2).start()
    sent = full(0)
    for step in range(20):
        for peer in others:
            for tensor in sent:
                tensor.fill_(100 * rank + step)
            mailbox.step = step
            mailbox.post(peer, 3, sent if step % 2 else None, weight=0.5, numbers=(0.1 * step,))
            for tensor in sent:
                tensor.fill_(-1.0)  # the message has a copy
        if step % 5 == 0:
            dist.all_reduce(torch.zeros(10))  # beside collectives of the training thread
    during = len(own_threads())
    messages = drain(mailbox, others)
    assert until(lambda: not any(map(mailbox.num_waiting, others)))
    mailbox.step, mailbox.step_ended = 77, 1.5
    for peer in others:
        mailbox.ping(peer)
    assert until(lambda: all(mailbox.latest[peer] == (77, 1.5) for peer in others))
    assert mailbox.collect() == []  # a ping is no message
    dist.barrier()
    weights = sum(mailbox.weight_posted), sum(mailbox.weight_collected)
    sent_bytes = mailbox.bytes_sent
    mixed, counts = stress(mailbox, others)
    dist.barrier()
    mailbox.close()
    ends = during, len(own_threads()), sorted(mailbox.left), mailbox.died
    return messages, ends, sent_bytes, weights, mixed, counts


def stress(mailbox, others):
    """Number of messages that are mixed of two, or out of order, and numbers of plain messages from each peer."""
    counts, mixed, last = dict.fromkeys(others, 0), 0, dict.fromkeys(others, -1.0)

    def check(messages):
        nonlocal mixed
        for m in messages:
            first = m.tensors[0][0].item()
            mixed += not all(bool((t == first).all()) for t in m.tensors)
            mixed += not m.is_sum and (first != m.step or first <= last[m.sender])
            last[m.sender] = last[m.sender] if m.is_sum else first
            counts[m.sender] += not m.is_sum
            mailbox.recycle(m)

    for value in range(1, NUM_VALUES + 1):
        mailbox.step = value
        for peer in others:
            if value % 3 == 0:
                mailbox.post_sum(peer, 1, full(value))
            else:
                mailbox.post(peer, 0, full(value))
        check(mailbox.collect())
    dist.barrier()
    check(drain(mailbox, others))
    return mixed, list(counts.values())


@pytest.mark.distributed
@pytest.mark.slow
def test_messages_arrive_whole_and_in_order_from_each_peer_and_no_thread_is_left():
    results = run_ranks(_exchange_plain_messages, 3)
    for rank, (messages, ends, sent_bytes, weights, mixed, counts) in enumerate(results):
        others = [peer for peer in range(3) if peer != rank]
        assert ends == (4, 0, others, set())
        assert weights == (20.0, 20.0)
        assert sent_bytes == (2 * 21) * 8 * (6 + 2) + 20 * 8 * sum(SIZES) + 2 * 8 * (6 + 2)
        assert mixed == 0
        assert counts == [NUM_VALUES * 2 // 3] * 2
        for peer in others:
            received = [m for m in messages if m.sender == peer]
            assert [m.step for m in received] == list(range(20))
            for m in received:
                assert (m.kind, m.weight, m.numbers, m.is_sum) == (3, 0.5, (0.1 * m.step, 0.0), False)
                assert (m.tensors is not None) == (m.step % 2 == 1)
                if m.tensors is not None:
                    torch.testing.assert_close(m.tensors, full(100 * peer + m.step), rtol=0, atol=0)


def _post_sums(rank, num):
    results = []
    for wire_dtype in (None, torch.bfloat16):
        mailbox = Mailbox(full(0, torch.float32), wire_dtype=wire_dtype).start()
        generator = torch.Generator().manual_seed(rank)
        posted, kept = [t.double() for t in full(0)], [t.double() for t in full(0)]
        most_waiting = 0
        for step in range(num if rank == 0 else 0):
            share = [torch.randn(size, generator=generator) for size in SIZES]
            for total, tensor in zip(posted, share):
                total.add_(tensor)
            mailbox.step, mailbox.step_ended = step, 0.5 * step
            mailbox.post_sum(1, 0, share, weight=0.25)
            if wire_dtype is not None:
                for total, tensor in zip(kept, share):
                    total.add_(tensor)
            most_waiting = max(most_waiting, mailbox.num_waiting(1))
        messages = drain(mailbox, [1 - rank])
        dist.barrier()
        if rank == 0:
            for value in (1.0, 2.0**-9):  # two that arrive one by one, and wait at the receiver
                mailbox.post_sum(1, 0, full(value, torch.float32), weight=1.0)
                assert until(lambda mailbox=mailbox: mailbox.num_waiting(1) == 0)
            mailbox.post(1, 1)
            mailbox.post_sum(1, 0, full(5.0, torch.float32), weight=1.0)
        dist.barrier()
        assert rank == 0 or until(lambda mailbox=mailbox: len(mailbox._inboxes[0]) >= 3)  # before one is collected
        uncollected = drain(mailbox, [1 - rank])
        results.append((posted, kept, messages, most_waiting, mailbox.weight_posted[1], uncollected))
        mailbox.close()
    return results


@pytest.mark.distributed
def test_sums_that_wait_are_added_up_and_nothing_is_lost():
    num = 400
    sender, receiver = run_ranks(_post_sums, 2, num)
    for (posted, kept, _, most_waiting, weight, _), (_, _, messages, _, _, uncollected), is_rounded in zip(
        sender, receiver, (False, True)
    ):
        assert most_waiting <= 2  # one that is being sent, and one for all the rest
        assert len(messages) < num
        assert weight == 0.25 * num + 3.0
        assert sum(m.weight for m in messages) == 0.25 * num
        assert (messages[-1].step, messages[-1].step_ended) == (num - 1, 0.5 * (num - 1))
        for i in range(len(SIZES)):
            arrived = sum(m.tensors[i].double() for m in messages)
            torch.testing.assert_close(arrived + kept[i], posted[i], rtol=0, atol=1e-3)
            assert bool(kept[i].any()) == is_rounded
        first, plain, last = uncollected  # added up at the receiver without rounding, in their places
        assert [m.kind for m in (first, plain, last)] == [0, 1, 0]
        assert (first.weight, last.weight) == (2.0, 1.0)
        assert first.tensors[0].tolist() == [1.0 + 2.0**-9] * SIZES[0]  # not a bfloat16
        assert last.tensors[1].tolist() == [5.0] * SIZES[1]
    # Without the rounding errors that the sender keeps the sums would not fit.
    assert (sum(m.tensors[0].double() for m in receiver[1][2]) - sender[1][0][0]).abs().max() > 1e-3


def _leave_early(rank):
    mailbox = Mailbox(full(0)).start()
    mailbox.post(1 - rank, 0)
    if rank == 0:
        began = time.monotonic()
        mailbox.close()
        result = time.monotonic() - began, len(own_threads())
    else:
        assert until(lambda: mailbox.left == {0})
        mailbox.post(0, 7, full(1), weight=1.0)
        back = mailbox.take_back(0)[-1]  # after the first message, if that had not left
        result = mailbox.died, back.kind, back.weight, sum(mailbox.weight_posted)
        mailbox.close()
    dist.barrier()
    mailbox = Mailbox(full(0)).start()  # a second one of the same group
    mailbox.post(1 - rank, 0, full(rank))
    [message] = drain(mailbox, [1 - rank])
    mailbox.close()
    failure = None
    if rank == 1:
        with pytest.raises(PeerError) as caught:
            Mailbox(full(0), connect_seconds=0.5).start()
        failure = caught.value.ranks
    return result, message.tensors[0][0].item(), failure, len(own_threads())


@pytest.mark.distributed
@pytest.mark.slow
def test_a_peer_that_closes_has_left_and_one_that_does_not_connect_is_named():
    [(first, value, _, threads), (second, other_value, failure, other_threads)] = run_ranks(_leave_early, 2)
    assert first[0] < 3.0
    assert first[1] == threads == other_threads == 0
    assert second == (set(), 7, 1.0, 0.0)
    assert (value, other_value, failure) == (1.0, 0.0, (0,))


def _outlive(rank, lost):
    mailbox = Mailbox([torch.zeros(BIG)]).start()
    pids = all_pids()
    if rank == lost:
        time.sleep(60.0)
    [survivor] = {0, 1, 2} - {rank, lost}
    drain(mailbox, [survivor])  # nobody needs the lost rank any more
    if rank == (lost + 1) % 3:
        os.kill(pids[lost], signal.SIGSTOP)  # so that messages to it cannot leave
    drain(mailbox, [survivor])
    for step in range(3):
        mailbox.step = step
        mailbox.post(lost, 0, [torch.full((BIG,), 1.0 + step)], weight=0.25)
    mailbox.post_sum(lost, 1, [torch.full((BIG,), 1.0)], weight=0.25)
    mailbox.post_sum(lost, 1, [torch.full((BIG,), 1.0)], weight=0.25)
    time.sleep(0.2)
    waiting = mailbox.num_waiting(lost)
    drain(mailbox, [survivor])
    began = time.monotonic()
    if rank == (lost + 1) % 3:
        os.kill(pids[lost], signal.SIGKILL)
    assert until(lambda: lost in mailbox.died)
    seconds = time.monotonic() - began
    back = [
        (m.kind, m.step, m.weight, m.tensors[0][0].item(), m.tensors[0][-1].item()) for m in mailbox.take_back(lost)
    ]
    mailbox.post(lost, 0, [torch.zeros(BIG)], weight=0.125)
    back_later = [m.weight for m in mailbox.take_back(lost)]
    mailbox.post(survivor, 5, [torch.full((BIG,), 9.0)])
    [message] = drain(mailbox, [survivor])
    weight, died = sum(mailbox.weight_posted), sorted(mailbox.died)
    mailbox.close()
    return waiting, seconds, back, back_later, message.tensors[0][-1].item(), weight, died, len(own_threads())


@pytest.mark.distributed
def test_a_dead_peer_is_noticed_by_all_and_messages_that_it_had_not_received_are_taken_back(tmp_path):
    results = run_ranks_that_are_left(_outlive, 3, tmp_path, 0, lost=[0])
    assert len(results) == 2
    for waiting, seconds, back, back_later, value, weight, died, threads in results.values():
        assert waiting == 4
        assert seconds < 1.0
        assert back == [(0, step, 0.25, 1.0 + step, 1.0 + step) for step in range(3)] + [(1, 2, 0.5, 2.0, 2.0)]
        assert back_later == [0.125]
        assert (value, weight, died, threads) == (9.0, 0.0, [0], 0)


def _close_beside_a_stopped_peer(rank):
    mailbox = Mailbox([torch.zeros(3)]).start()
    pids = all_pids()
    if rank == 1:
        dist.barrier()
        time.sleep(60.0)
    dist.barrier()
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.3)
    gone, began = mailbox.gone, time.monotonic()
    mailbox.close(1.0)
    seconds = time.monotonic() - began
    os.kill(pids[1], signal.SIGKILL)
    return gone, seconds, len(own_threads())


@pytest.mark.distributed
@pytest.mark.slow
def test_a_stopped_peer_is_not_gone_and_closing_beside_it_ends_at_the_deadline(tmp_path):
    gone, seconds, threads = run_ranks_that_are_left(_close_beside_a_stopped_peer, 2, tmp_path, lost=[1])[0]
    assert (gone, threads) == (set(), 0)
    assert 0.9 < seconds < 3.0


SCRIPT = """
import sys, time, torch, torch.distributed as dist
from hf_msn.distributed.comm.mailbox import Mailbox
rank = int(sys.argv[2])
dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=rank, world_size=2)
mailbox = Mailbox([torch.zeros(3)]).start()
dist.barrier()
if rank == 0:
    raise ValueError('on purpose')
deadline = time.monotonic() + 10.0
while mailbox.died != {0} and time.monotonic() < deadline:
    time.sleep(0.01)
dist.destroy_process_group()
print('noticed', mailbox.died)
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_scripts_end_with_an_open_mailbox(tmp_path):
    path = f"{Path(hf_msn.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "rendezvous"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=40.0) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 0], outputs
    assert "ValueError: on purpose" in outputs[0][1]
    assert outputs[1][0] == "noticed {0}\n"


def test_turns_go_to_the_oldest_step_and_pass_on_when_a_message_takes_too_long():
    turns, order, release = Turns(seconds=0.3), [], threading.Event()

    def take(step, wait=None):
        with turns.take(step, lambda: False):
            order.append(step)
            if wait is not None:
                wait.wait(10.0)

    def started(*arguments):
        thread = threading.Thread(target=take, args=arguments, daemon=True)
        thread.start()
        return thread

    began = time.monotonic()
    threads = [started(9, release)]
    assert until(lambda: order == [9])
    threads += [started(step) for step in (7, 5, 6)]
    time.sleep(0.1)
    assert order == [9] and not any(thread.join(0.0) or not thread.is_alive() for thread in threads)
    assert until(lambda: len(order) == 4)  # though the first one does not end
    assert order == [9, 5, 6, 7] and time.monotonic() - began >= 0.3
    release.set()
    with turns.take(1, lambda: True):  # of a peer that is gone: without a turn
        take(2)
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
