"""The mailbox between real ranks: order, wholeness, sums that lose nothing, and peers that die or stop."""

import time

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from mailbox_runs import SIZES, collect_until, full, own_threads

from hf_msn.distributed.comm.mailbox import Mailbox


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
