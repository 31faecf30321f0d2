"""The mailbox between real ranks: order, wholeness, sums that lose nothing, and peers that die or stop."""

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
from lost_ranks import run_ranks_that_are_left

import hf_msn
from hf_msn.distributed import PeerError
from hf_msn.distributed.messages.mailbox import Mailbox

SIZES = [7, 3]


def full(value, dtype=torch.float64):
    return [torch.full((size,), float(value), dtype=dtype) for size in SIZES]


def collect_until(mailbox, enough, seconds=10.0):
    """Messages, until `enough(messages)`."""
    messages, deadline = [], time.monotonic() + seconds
    while not enough(messages):
        assert time.monotonic() < deadline, f"only {len(messages)} messages after {seconds} s"
        messages += mailbox.collect(0.2)
    return messages


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hf_msn mailbox")]


def all_pids(rank):
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


# Between healthy ranks


def _exchange_plain_messages(rank):
    others = [peer for peer in range(3) if peer != rank]
    mailbox = Mailbox(full(0), num_numbers=2).start()
    sent = full(0)
    for step in range(20):
        for peer in others:
            for tensor in sent:
                tensor.fill_(100 * rank + step)
            mailbox.post(peer, 3, sent if step % 2 else None, step=step, weight=0.5, numbers=(0.1 * step,))
            for tensor in sent:
                tensor.fill_(-1.0)  # what was posted is a copy
        if step % 5 == 0:
            dist.all_reduce(torch.zeros(10))  # beside collectives of the training thread
    messages = collect_until(mailbox, lambda found: len(found) == 40)
    names = len(own_threads())
    assert mailbox.wait_for(lambda: not any(map(mailbox.num_waiting, others)), 5.0)
    sent_bytes = mailbox.bytes_sent
    under_way = mailbox.weight_under_way
    dist.barrier()
    mailbox.close()
    received = {peer: [m for m in messages if m.sender == peer] for peer in others}
    return received, names, len(own_threads()), sent_bytes, under_way, sorted(mailbox.left), mailbox.died


@pytest.mark.distributed
def test_messages_arrive_whole_and_in_order_from_each_peer_and_no_thread_is_left():
    for received, during, after, sent_bytes, under_way, left, died in run_ranks(_exchange_plain_messages, 3):
        assert (during, after, died) == (4, 0, set())
        assert len(left) == 2
        assert under_way == pytest.approx(0.0)
        header = 8 * (5 + 2)
        assert sent_bytes == 40 * header + 20 * 8 * sum(SIZES)
        for peer, messages in received.items():
            assert [m.step for m in messages] == list(range(20))
            for m in messages:
                assert (m.kind, m.weight, m.numbers, m.is_sum) == (3, 0.5, (0.1 * m.step, 0.0), False)
                assert (m.tensors is not None) == (m.step % 2 == 1)
                if m.tensors is not None:
                    torch.testing.assert_close(m.tensors, full(100 * peer + m.step), rtol=0, atol=0)


def _post_sums(rank, wire_dtype, num):
    mailbox = Mailbox(full(0, torch.float32), wire_dtype=wire_dtype).start()
    generator = torch.Generator().manual_seed(rank)
    posted, kept = [t.double() for t in full(0)], [t.double() for t in full(0)]
    most_waiting = 0
    if rank == 0:
        for step in range(num):
            share = [torch.randn(size, generator=generator) for size in SIZES]
            for total, tensor in zip(posted, share):
                total.add_(tensor)
            mailbox.post_sum(1, 0, share, step=step, weight=0.25, numbers=(step,))
            if wire_dtype is not None:
                for total, tensor in zip(kept, share):
                    total.add_(tensor)
            most_waiting = max(most_waiting, mailbox.num_waiting(1))
    messages = []
    if rank == 1:
        messages = collect_until(mailbox, lambda found: sum(m.weight for m in found) == 0.25 * num)
    dist.barrier()
    weights = mailbox.weight_posted, mailbox.weight_collected
    mailbox.close()
    return posted, kept, messages, most_waiting, weights


@pytest.mark.distributed
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_sums_that_wait_are_added_up_and_nothing_is_lost(wire_dtype):
    num = 400
    [sender, receiver] = run_ranks(_post_sums, 2, wire_dtype, num)
    posted, kept, _, most_waiting, (weight_posted, _) = sender
    messages, weight_collected = receiver[2], receiver[4][1]
    assert most_waiting <= 2  # one that is being sent, and one for all the rest
    assert len(messages) < num
    assert weight_posted[1] == weight_collected[0] == 0.25 * num
    assert messages[-1].step == messages[-1].numbers[0] == num - 1
    for i in range(len(SIZES)):
        arrived = sum(m.tensors[i].double() for m in messages)
        torch.testing.assert_close(arrived + kept[i], posted[i], rtol=0, atol=1e-3)
        assert (wire_dtype is None) == (not kept[i].any())
    if wire_dtype is not None:  # without what was kept back it would not fit
        assert (sum(m.tensors[0].double() for m in messages) - posted[0]).abs().max() > 1e-3


def _sums_are_added_up_where_nobody_collects(rank):
    mailbox = Mailbox(full(0, torch.float32), wire_dtype=torch.bfloat16).start()
    if rank == 0:
        for value in (1.0, 2.0**-9):
            mailbox.post_sum(1, 0, full(value, torch.float32), weight=1.0)
            assert mailbox.wait_for(lambda: mailbox.num_waiting(1) == 0, 10.0)
        mailbox.post(1, 1)
        mailbox.post_sum(1, 0, full(5.0, torch.float32), weight=1.0)
    mailbox.drain(10.0)
    messages = mailbox.collect()
    mailbox.close()
    return messages


@pytest.mark.distributed
def test_sums_that_nobody_collects_are_added_up_without_rounding_and_keep_their_place():
    first, plain, last = run_ranks(_sums_are_added_up_where_nobody_collects, 2)[1]
    assert [m.kind for m in (first, plain, last)] == [0, 1, 0]
    assert (first.weight, last.weight) == (2.0, 1.0)
    assert first.tensors[0].tolist() == [1.0 + 2.0**-9] * SIZES[0]  # not a bfloat16
    assert last.tensors[1].tolist() == [5.0] * SIZES[1]


def _stress(rank, seconds):
    size = 30011
    mailbox = Mailbox([torch.zeros(size), torch.zeros(5)]).start()
    others = [peer for peer in range(dist.get_world_size()) if peer != rank]
    counts, mixed, last = [0] * 3, 0, [-1.0] * 3
    value, ends = 0, time.monotonic() + seconds
    buffers = [torch.zeros(size), torch.zeros(5)]

    def look(messages):
        nonlocal mixed
        for m in messages:
            first = m.tensors[0][0].item()
            mixed += not all(bool((t == first).all()) for t in m.tensors) or (not m.is_sum and first != m.step)
            mixed += not m.is_sum and first <= last[m.sender]
            last[m.sender] = first if not m.is_sum else last[m.sender]
            counts[m.sender] += 1
            mailbox.recycle(m)

    while time.monotonic() < ends:
        value += 1
        for buffer in buffers:
            buffer.fill_(value)
        for peer in others:
            if value % 3 == 0:
                mailbox.post_sum(peer, 1, buffers, step=value)
            elif mailbox.num_waiting(peer) < 3:
                mailbox.post(peer, 0, buffers, step=value)
        look(mailbox.collect())
    mailbox.drain(10.0)
    look(mailbox.collect())
    mailbox.close()
    return mixed, [counts[peer] for peer in others]


@pytest.mark.distributed
def test_what_arrives_is_never_mixed_of_two_messages_however_fast_they_are_posted():
    for mixed, counts in run_ranks(_stress, 3, 2.0):
        assert mixed == 0
        assert min(counts) > 50


def _drain_after_random_delays(rank):
    mailbox = Mailbox(full(0)).start()
    sums = []
    for turn in range(3):
        time.sleep(0.05 * ((rank + turn) % 3))
        for peer in range(3):
            if peer != rank:
                mailbox.post_sum(peer, 0, full(1), weight=1.0)
                mailbox.post(peer, 1, full(1), weight=1.0)
        mailbox.drain(10.0)
        messages = mailbox.collect()
        sums.append((sum(m.weight for m in messages), mailbox.weight_under_way))
        dist.barrier()
    mailbox.close()
    return sums


@pytest.mark.distributed
def test_draining_leaves_nothing_under_way():
    for sums in run_ranks(_drain_after_random_delays, 3):
        assert sums == [(4.0, 0.0)] * 3


def _leave_early(rank):
    mailbox = Mailbox(full(0)).start()
    mailbox.post(1 - rank, 0, step=rank)
    if rank == 0:
        started = time.monotonic()
        mailbox.close()
        dist.barrier()
        return time.monotonic() - started, mailbox.collect(), len(own_threads())
    noticed = mailbox.wait_for(lambda: mailbox.left == {0}, 5.0)
    mailbox.post(0, 7, full(1), weight=1.0)
    [back] = mailbox.take_back(0)
    dist.barrier()
    mailbox.close()
    return noticed, mailbox.died, back, mailbox.weight_under_way, len(own_threads())


@pytest.mark.distributed
def test_a_peer_that_closes_is_answered_in_the_background_and_has_left():
    [(seconds, messages, threads), (noticed, died, back, under_way, other_threads)] = run_ranks(_leave_early, 2)
    assert seconds < 3.0
    assert [m.step for m in messages] in ([1], [])
    assert (noticed, died, back.kind, back.weight, under_way) == (True, set(), 7, 1.0, 0.0)
    assert threads == other_threads == 0


def _open_twice_and_fail(rank):
    for _ in range(2):
        mailbox = Mailbox(full(0)).start()
        mailbox.post(1 - rank, 0, full(rank))
        mailbox.drain(5.0)
        assert mailbox.collect()[0].tensors[0][0] == 1 - rank
        mailbox.close()
    if rank == 0:
        return None
    with pytest.raises(PeerError, match=r"Rank 0 must connect within 0\.5 s") as failure:
        Mailbox(full(0), connect_seconds=0.5).start()
    return failure.value.ranks


@pytest.mark.distributed
def test_a_group_can_have_mailboxes_after_one_another_and_who_does_not_come_is_named():
    assert run_ranks(_open_twice_and_fail, 2)[1] == (0,)


# Peers that die or stop


def _outlive(rank, lost):
    big = 4_000_000
    mailbox = Mailbox([torch.zeros(big)]).start()
    others = [peer for peer in range(3) if peer != rank]
    pids = all_pids(rank)
    if rank == lost:
        time.sleep(60.0)
    survivor = next(peer for peer in others if peer != lost)
    mailbox.drain(10.0, peers=[survivor])  # it has all process ids: nobody needs the lost one any more
    if rank == (lost + 1) % 3:
        os.kill(pids[lost], signal.SIGSTOP)  # so that what is posted cannot leave
    mailbox.drain(10.0, peers=[survivor])
    for step in range(3):
        mailbox.post(lost, 0, [torch.full((big,), 1.0 + step)], step=step, weight=0.25)
    mailbox.post_sum(lost, 1, [torch.full((big,), 1.0)], weight=0.25)
    mailbox.post_sum(lost, 1, [torch.full((big,), 1.0)], weight=0.25)
    time.sleep(0.2)
    waiting = mailbox.num_waiting(lost)
    mailbox.drain(10.0, peers=[survivor])
    started = time.monotonic()
    if rank == (lost + 1) % 3:
        os.kill(pids[lost], signal.SIGKILL)
    noticed = mailbox.wait_for(lambda: lost in mailbox.died, 5.0)
    seconds = time.monotonic() - started
    back = [
        (m.kind, m.step, m.weight, m.tensors[0][0].item(), m.tensors[0][-1].item()) for m in mailbox.take_back(lost)
    ]
    mailbox.post(lost, 0, [torch.zeros(big)], weight=0.125)
    back_later = [m.weight for m in mailbox.take_back(lost)]
    mailbox.post(survivor, 5, [torch.full((big,), 9.0)])
    mailbox.drain(10.0)
    [message] = mailbox.collect()
    under_way, died = mailbox.weight_under_way, sorted(mailbox.died)
    mailbox.close()
    return (
        waiting,
        noticed,
        seconds,
        back,
        back_later,
        message.tensors[0][-1].item(),
        under_way,
        died,
        len(own_threads()),
    )


@pytest.mark.distributed
@pytest.mark.parametrize("lost", [0, 2])
def test_a_dead_peer_is_noticed_by_all_and_what_it_had_not_received_can_be_taken_back(tmp_path, lost):
    results = run_ranks_that_are_left(_outlive, 3, tmp_path, lost, lost=[lost])
    assert len(results) == 2
    for waiting, noticed, seconds, back, back_later, value, under_way, died, threads in results.values():
        assert waiting == 4
        assert noticed
        assert seconds < 1.0
        assert back == [(0, step, 0.25, 1.0 + step, 1.0 + step) for step in range(3)] + [(1, 0, 0.5, 2.0, 2.0)]
        assert back_later == [0.125]
        assert (value, under_way, died, threads) == (9.0, 0.0, [lost], 0)


def _stop_and_go_on(rank):
    big = 4_000_000
    mailbox = Mailbox([torch.zeros(big)]).start()
    pids = all_pids(rank)
    mailbox.drain(10.0)
    if rank == 1:
        mailbox.post(0, 9)  # it has drained: it needs nothing of the stopped one
    if rank == 0:
        collect_until(mailbox, lambda found: any(message.kind == 9 for message in found))
        os.kill(pids[2], signal.SIGSTOP)
        for step in range(5):
            mailbox.post_sum(2, 0, [torch.ones(big)], step=step, weight=0.1)
            mailbox.post(1, 0, step=step)
        with pytest.raises(PeerError, match="rank 2 has not sent its last to rank 0") as failure:
            mailbox.drain(0.5, number=2)
        assert failure.value.ranks == (2,)
        seen = mailbox.num_waiting(2), sorted(mailbox.gone)
        os.kill(pids[2], signal.SIGCONT)
        mailbox.drain(10.0, number=3)
        mailbox.close()
        return seen
    messages = []
    if rank == 2:
        messages = collect_until(mailbox, lambda found: sum(m.weight for m in found) > 0.45)
    mailbox.drain(10.0, number=3)
    messages += mailbox.collect()
    mailbox.close()
    return (
        [m.step for m in messages],
        sum(m.tensors[0][-1].item() for m in messages if m.tensors),
        sorted(mailbox.died),
    )


@pytest.mark.distributed
def test_a_stopped_peer_is_silent_and_goes_on_where_it_stood():
    [(waiting, gone), (steps, _, died), (_, total, died_too)] = run_ranks(_stop_and_go_on, 3)
    assert (waiting, gone, died, died_too) == (3, [], [], [])  # the sums and the drain that failed
    assert steps == list(range(5))
    assert total == 5.0


def _close_beside_a_stopped_peer(rank):
    mailbox = Mailbox(full(0)).start()
    pids = all_pids(rank)
    mailbox.drain(10.0)
    if rank == 1:
        time.sleep(60.0)
    os.kill(pids[1], signal.SIGSTOP)
    started = time.monotonic()
    mailbox.close(1.0)
    result = time.monotonic() - started, len(own_threads())
    os.kill(pids[1], signal.SIGKILL)
    return result


@pytest.mark.distributed
def test_closing_beside_a_stopped_peer_ends_at_the_deadline(tmp_path):
    seconds, threads = run_ranks_that_are_left(_close_beside_a_stopped_peer, 2, tmp_path, lost=[1])[0]
    assert 0.9 < seconds < 2.5
    assert threads == 0


SCRIPT = """
import sys, types, torch, torch.distributed as dist
sys.modules['hf_msn'] = package = types.ModuleType('hf_msn')  # without all the rest, which takes long to import
package.__path__ = [sys.argv[4]]
from hf_msn.distributed.messages.mailbox import Mailbox
file, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group('gloo', init_method='file://' + file, rank=rank, world_size=2)
mailbox = Mailbox([torch.zeros(3)]).start()
dist.barrier()
if how == 'destroyed':
    dist.destroy_process_group()
elif rank == 0:
    raise ValueError('on purpose')
else:
    print('noticed', mailbox.wait_for(lambda: mailbox.died == {0}, 10.0))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["destroyed", "raised"])
def test_a_script_ends_with_an_open_mailbox(tmp_path, how):
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SCRIPT,
                str(tmp_path / "rendezvous"),
                str(rank),
                how,
                str(Path(hf_msn.__file__).parent),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=40.0) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [int(how == "raised"), 0], outputs
    if how == "raised":
        assert "ValueError: on purpose" in outputs[0][1]
        assert outputs[1][0] == "noticed True\n"
