"""Lost and silent peers, and agreements among the others, over a mailbox within one process."""

import threading
import time

import pytest
import torch

from hf_msn.distributed.comm.agreement import Agreement
from hf_msn.distributed.comm.connection import Message
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.comm.membership import Membership
from hf_msn.distributed.comm.wire import as_bytes


class LocalMailbox:
    """The mailbox of one rank; `network` holds those of all."""

    def __init__(self, rank, size, network):
        self.rank, self.size, self.global_ranks = rank, size, list(range(size))
        self.died, self.left = set(), set()
        self.last_heard, self.latest = [time.monotonic()] * size, [(-1, 0.0)] * size
        self.step, self.step_ended = 0, 0.0
        self._inbox, self._arrived, self._network = [], threading.Condition(), network
        network[rank] = self

    def collect(self, timeout_seconds=0.0):
        with self._arrived:
            self._arrived.wait_for(lambda: self._inbox, timeout_seconds)
            messages, self._inbox = self._inbox, []
        return messages

    def post(self, peer, kind, *, payload=None, numbers=()):
        tensors = None if payload is None else [payload]
        if peer not in self.died and self.rank not in self._network[peer].died:
            self._network[peer].deliver(Message(self.rank, kind, self.step, numbers=tuple(numbers), tensors=tensors))

    def ping(self, peer):
        self.post(peer, -1)

    def deliver(self, message):
        with self._arrived:
            self.last_heard[message.sender] = time.monotonic()
            self.latest[message.sender] = message.step, message.step_ended
            if message.kind >= 0:
                self._inbox.append(message)
                self._arrived.notify_all()

    def cut(self, peer):
        self.died.add(peer)
        self._network[peer].died.add(self.rank)


def make_peers(timeout_seconds=0.1, **options):
    network, received, changed = {}, [], []
    mailboxes = [LocalMailbox(rank, 3, network) for rank in range(3)]
    peers = Membership(mailboxes[0], timeout_seconds, received.append, changed.append, **options)
    return peers, mailboxes, received, changed


def test_a_peer_that_is_expected_and_silent_is_passed_over_until_it_is_heard():
    peers, mailboxes, received, changed = make_peers()
    mailboxes[1].step = 3
    mailboxes[1].post(0, 5)
    peers.wait_for(lambda: [2] if 2 in peers.members else [])
    assert [message.step for message in received] == [3]
    assert (peers.members, peers.silent, peers.lost, changed) == ({0, 1}, {2}, set(), [2])
    assert peers.seconds_waiting > 0.1
    peers.update()
    assert peers.silent == {2}
    mailboxes[2].ping(0)
    peers.update()
    assert (peers.members, changed) == ({0, 1, 2}, [2, 2])
    assert mailboxes[2].latest[0][0] >= 0  # a rank that waits pings the others


def test_nobody_is_silent_to_a_rank_that_stood_still_itself():
    peers, _, _, _ = make_peers()
    assert peers.expect([1, 2], 0.05) == []
    time.sleep(0.15)
    assert peers.expect([1, 2], 0.05) == []
    assert peers.expect([1, 2], 0.05) == []
    for _ in range(8):
        time.sleep(0.02)
        silent = peers.expect([1, 2], 0.05)
    assert silent == [1, 2]


def test_a_dead_peer_is_lost_and_one_that_left_only_where_it_is_missing():
    peers, mailboxes, _, changed = make_peers()
    mailboxes[0].died, mailboxes[0].left = {1}, {2}
    peers.wait_for(lambda: [])
    assert (peers.lost, peers.connected, changed) == ({1}, [2], [1])
    peers.wait_for(lambda: [2] if 2 in peers.connected else [])
    assert peers.lost == {1, 2}
    assert peers.members == {0}


@pytest.mark.parametrize("fault", ["lost", "silent"])
def test_without_tolerance_a_fault_is_an_error_that_names_the_rank(fault):
    peers, mailboxes, _, _ = make_peers(tolerant=False)
    if fault == "lost":
        mailboxes[0].died = {2}
    with pytest.raises(PeerError) as caught:
        peers.wait_for(lambda: [2])
    assert caught.value.ranks == (2,)


class Killed(Exception):
    pass


class Rank(threading.Thread):
    """A rank that reaches `num` agreements on the sum of all ranks' numbers."""

    def __init__(self, rank, network, *, on_silent="pass over", num=1, delay=0.0, collective=True):
        super().__init__(daemon=True)
        self.mailbox = LocalMailbox(rank, 3, network)
        self.peers = Membership(self.mailbox, 0.4, lambda message: self.agreement.receive(message))
        self.agreement = Agreement(self.peers, self.pass_on, on_silent)
        self.number, self.num, self.delay, self.collective = float(10**rank), num, delay, collective
        self.results, self.passed_on, self.errors = [], [], []

    def pass_on(self, message):
        self.passed_on.append((len(self.results), message.sender))

    def by_collectives(self):
        if not self.collective:
            raise PeerError("broken")

    def combine(self, contributions):
        return as_bytes([torch.tensor([sum(payload.view(torch.float64).item() for _, payload in contributions)])])

    def finish(self, result):
        self.results.append(None if result is None else result.view(torch.float32).item())

    def run(self):
        time.sleep(self.delay)
        try:
            for _ in range(self.num):
                self.reach()
                for peer in self.peers.connected:
                    self.mailbox.post(peer, 0)  # belongs to the time after this agreement
        except Killed:
            return

    def reach(self):
        own = as_bytes([torch.tensor([self.number], dtype=torch.float64)])
        while True:
            try:
                return self.agreement.reach(self.by_collectives, lambda: (1.0, own), self.combine, self.finish)
            except PeerError as error:
                self.errors.append(error.ranks)


def run_all(ranks):
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(15.0)
        assert not rank.is_alive()


@pytest.mark.parametrize("on_silent", ["pass over", "raise"])
def test_all_ranks_use_collectives_and_messages_of_a_faster_rank_come_after_the_end(on_silent):
    network = {}
    ranks = [Rank(r, network, on_silent=on_silent, num=3, delay=0.05 * r) for r in range(3)]
    run_all(ranks)
    for rank in ranks:
        assert rank.results == [None] * 3
        for peer in ranks:
            done = [count for count, sender in rank.passed_on if sender == peer.mailbox.rank]
            assert all(count >= sent for sent, count in enumerate(done, 1))  # never before the same agreement ended


def test_if_collectives_fail_on_one_rank_all_take_the_result_by_messages():
    network = {}
    ranks = [Rank(r, network, num=2, collective=r != 1) for r in range(3)]
    run_all(ranks)
    assert [rank.results for rank in ranks] == [[111.0, 111.0]] * 3


@pytest.mark.parametrize("on_silent", ["pass over", "raise"])
def test_a_rank_that_dies_before_or_inside_an_agreement_is_left_out(on_silent):
    network = {}
    ranks = [Rank(r, network, on_silent=on_silent, num=2, collective=False) for r in range(3)]
    victim = ranks[0]

    def die():
        victim.mailbox.cut(1)
        victim.mailbox.cut(2)
        raise Killed

    victim.by_collectives = die
    run_all(ranks)
    assert [rank.results for rank in ranks[1:]] == [[110.0, 110.0]] * 2


@pytest.mark.slow
def test_a_silent_rank_is_passed_over_and_takes_the_results_when_it_comes():
    network = {}
    ranks = [Rank(r, network, num=2, delay=1.5 if r == 1 else 0.0) for r in range(3)]
    run_all(ranks)
    assert [rank.results for rank in ranks] == [[101.0, 101.0]] * 3


@pytest.mark.slow
def test_a_rank_that_waits_for_silent_ones_raises_an_error_and_goes_on_when_they_come():
    network = {}
    ranks = [Rank(r, network, on_silent="raise", delay=1.2 if r == 1 else 0.0) for r in range(3)]
    run_all(ranks)
    for rank in (ranks[0], ranks[2]):
        assert rank.errors
        assert set(rank.errors) == {(1,)}
    assert [rank.results for rank in ranks] == [[None]] * 3
