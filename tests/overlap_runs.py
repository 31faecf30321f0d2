"""Training runs for the tests of overlapped gossip."""

from gossip_reference import data, flat, gradient, make_model

NUM_STEPS = 9
RATE, MOMENTUM = 0.05, 0.9


def take_step(model, optimizer, rank, step):
    x, y = data(rank, step)
    optimizer.zero_grad()
    ((model(x) - y) ** 2).mean().backward()
    optimizer.step()


def reference(topology, bound, sync_after=4):
    n = topology.world_size
    x = [flat(make_model()) for _ in range(n)]
    z = list(x)
    w, m = [1.0] * n, [0.0] * n
    under_way, seen, weights = [], [[] for _ in range(n)], [[] for _ in range(n)]

    def merge(sent_until):
        for message in sorted((entry for entry in under_way if entry[0] <= sent_until), key=lambda e: e[:2]):
            _, _, receiver, share, weight = message
            x[receiver] = x[receiver] + share
            w[receiver] += weight
        under_way[:] = [message for message in under_way if message[0] > sent_until]

    def consensus():
        merge(NUM_STEPS)
        mean = sum(x) / sum(w)
        for i in range(n):
            x[i], z[i], w[i] = mean.clone(), mean.clone(), 1.0

    for step in range(NUM_STEPS):
        for i in range(n):
            m[i] = MOMENTUM * m[i] + gradient(z[i], i, step)
            x[i] = x[i] - RATE * m[i]
        for i in range(n):
            peers = topology.out_peers(i, step)
            x[i], w[i] = x[i] / (len(peers) + 1), w[i] / (len(peers) + 1)
            under_way += [(step, i, peer, x[i].clone(), w[i]) for peer in peers]
        merge(step - bound)
        for i in range(n):
            z[i] = x[i] / w[i]
        if step == sync_after:
            consensus()
        for i in range(n):
            seen[i].append(z[i].clone())
            weights[i].append(w[i])
    consensus()
    return [([*seen[i], z[i]], weights[i]) for i in range(n)]


def weight_under_way(sync, ranks=None):
    """The weight that `sync` has sent to `ranks`, by default the connected ones, less that merged from them."""
    mailbox = sync._mailbox
    peers = [rank for rank in ranks or sync._peers.connected if rank != mailbox.rank]
    sent = sum(mailbox.weight_posted[peer] - mailbox.weight_collected[peer] for peer in peers)
    return sent + sum(message.weight for message in sync._unmerged)
