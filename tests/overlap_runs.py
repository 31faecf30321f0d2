"""Training runs for the tests of overlapped gossip."""

import torch

NUM_STEPS = 9


RATE, MOMENTUM = 0.05, 0.9


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 3, generator=generator).double(), torch.randn(5, 2, generator=generator).double()


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2).double()


def take_step(model, optimizer, rank, step):
    x, y = data(rank, step)
    optimizer.zero_grad()
    ((model(x) - y) ** 2).mean().backward()
    optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def reference(topology, bound, sync_after=4):
    n = topology.world_size
    x = [flat(make_model()) for _ in range(n)]
    z = [v.clone() for v in x]
    w, m = [1.0] * n, [torch.zeros_like(x[0]) for _ in range(n)]
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
            inputs, targets = data(i, step)
            weight, bias = z[i][:6].view(2, 3), z[i][6:]
            residual = inputs @ weight.T + bias - targets
            gradient = [2 * residual.T @ inputs / residual.numel(), 2 * residual.sum(0) / residual.numel()]
            m[i] = MOMENTUM * m[i] + torch.cat([g.flatten() for g in gradient])
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
