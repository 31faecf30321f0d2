"""A mailbox whose peers leave, die or stop, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from lost_ranks import run_ranks_that_are_left
from mailbox_runs import collect_until, full, own_threads

import hf_msn
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.comm.mailbox import Mailbox


def all_pids(rank):
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


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
from hf_msn.distributed.comm.mailbox import Mailbox
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
