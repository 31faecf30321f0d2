"""Whom a rank waits for, by what the senders have said; with a mailbox that hands out what a test puts in."""

import pytest

from hf_msn.distributed.comm.mailbox import Message
from hf_msn.distributed.mixing.live_peers import MASS, PING, VIEW, LivePeers, SendingPlan
from hf_msn.distributed.topology import RingTopology


class ScriptedMailbox:
    def __init__(self, rank, size):
        self.rank, self.size, self.global_ranks = rank, size, list(range(size))
        self.arriving, self.posted = [], []
        self.died, self.left, self.last_heard = set(), set(), [0.0] * size

    @property
    def gone(self):
        return self.died | self.left

    def collect(self, timeout_seconds=0.0):
        messages, self.arriving = self.arriving, []
        return messages

    def post(self, peer, kind, step=0, numbers=()):
        self.posted.append((peer, kind, step, numbers))

    def num_waiting(self, peer):
        return 0

    def take_back(self, peer):
        return []


def make_peers(timeout_seconds=0.05):
    taken, disturbed = [], []
    mailbox = ScriptedMailbox(0, 3)
    peers = LivePeers(
        mailbox,
        RingTopology(3, directed=True),  # 2 sends to 0
        timeout_seconds,
        taken.append,
        taken.append,
        lambda: disturbed.append(True),
        tolerant=True,
    )
    return peers, mailbox, taken, disturbed


def test_a_plan_follows_each_sender_from_the_step_that_it_has_said():
    plan = SendingPlan(RingTopology(3, directed=True))
    plan.announce(2, 5, frozenset({1, 2}))
    assert [plan.out_peers(2, step) for step in (0, 4, 5, 9)] == [[0], [0], [1], [1]]
    assert plan.out_peers(1, 9) == [2]
    assert not plan.is_whole()
    plan.announce(2, 7, frozenset({0, 1, 2}))
    assert [plan.out_peers(2, step) for step in (4, 6, 7)] == [[0], [1], [0]]
    assert plan.is_whole()


def test_nobody_waits_for_mass_that_the_sender_has_said_goes_elsewhere():
    peers, mailbox, taken, disturbed = make_peers()
    peers.sent = 5
    mailbox.arriving = [Message(2, MASS, step=1), Message(2, VIEW, step=2, numbers=(0.0, 1.0, 1.0))]
    peers.look()
    assert [message.step for message in taken] == [1]
    assert disturbed == [True]
    assert peers._missing(2) == [2]  # what was sent at step 2 was for this rank
    mailbox.arriving = [Message(2, MASS, step=2)]
    peers.wait_for_mass(4)
    assert peers.passed == set()
    # Who takes this rank for gone hears that it is not.
    assert (2, PING) in [(peer, kind) for peer, kind, *_ in mailbox.posted]


def test_a_peer_that_comes_back_is_waited_for_at_its_own_step():
    peers, mailbox, *_ = make_peers()
    peers.sent = 3
    peers.wait_for_mass(1)  # silent until the deadline
    assert (peers.view, peers.passed) == ({0, 1}, {2})
    assert {peer for peer, kind, *_ in mailbox.posted if kind == VIEW} == {1, 2}
    peers.sent = 10
    mailbox.arriving = [Message(2, MASS, step=3)]
    peers.wait_for_mass(8)
    assert (peers.view, peers.passed) == ({0, 1, 2}, set())
    peers.sent = 11
    assert peers._missing(10) == [2]  # its step 4, not what it would have sent at step 10
    mailbox.arriving = [Message(2, MASS, step=4)]
    peers.wait_for_mass(10)
    assert 2 in peers.view


@pytest.mark.parametrize("how", ["died", "left"])
def test_a_lost_peer_is_not_waited_for(how):
    peers, mailbox, *_ = make_peers(timeout_seconds=100.0)
    peers.sent = 3
    setattr(mailbox, how, {2})
    peers.wait_for_mass(2)
    assert (peers.view, peers.lost, peers.reachable()) == ({0, 1}, {2}, [1])
