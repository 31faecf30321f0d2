"""Gossip as its equations say it: loops over ranks and mixing matrices in float64."""

import copy

import torch
from states import resumed_in_two_ways

from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.topology import ExponentialTopology, Topology

NUM_STEPS = 8
CHANGING = [(0.2 / (1 + k), 0.1 + 0.02 * k) for k in range(NUM_STEPS)]
# A step inside of a period, the last of one and a whole period are without a step size somewhere.
WITH_ZEROS = [(0.2, 0.1), (0.0, 0.3), (0.1, 0.0), (0.1, 0.2), (0.1, 0.2), (0.0, 0.0), (0.3, 0.3), (0.1, 0.1)]
DEFAULTS = {
    "topology": None,
    "push_sum": True,
    "sync_every": 1,
    "wire_dtype": None,
    "quasi_global_momentum": None,
    "consensus_target": None,
    "max_extra_rounds": 8,
    "consensus_until_step": None,
}
# Settings of a run beside Gossip's arguments: rates of the two groups, SGD's momentum, a sync after a step, SlowMo.
RUN = {"rates": CHANGING, "momentum": 0.9, "sync_after": None, "slowmo": None}
GROUP = torch.tensor([0] * 6 + [1] * 2)
QUASI_GLOBAL = {"momentum": 0.0, "quasi_global_momentum": 0.9}


class Lopsided(Topology):
    """Directed, irregular, without a period: rank 0 sends to all, others to the next one; every third step nobody."""

    def _out_peers(self, rank, step):
        if step % 3 == 2:
            return []
        others = [other for other in range(self.world_size) if other != rank]
        return others if rank == 0 else [(rank + 1) % self.world_size]


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 3, generator=generator).double(), torch.randn(5, 2, generator=generator).double() + rank


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2).double()


def make_optimizer(model, momentum):
    return torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1, momentum=momentum)


def split_case(case):
    run = {name: case.get(name, default) for name, default in RUN.items()}
    return run, {name: case.get(name, default) for name, default in DEFAULTS.items()}


def make_sync(model, optimizer, case, world_size, **more):
    run, options = split_case(case)
    if options["topology"] is not None:
        options["topology"] = options["topology"](world_size)
    gossip = Gossip(model, optimizer, **options, **more)
    return gossip if run["slowmo"] is None else SlowMo(model, optimizer, base=gossip, **run["slowmo"], **more)


def take_step(model, optimizer, rates, rank, step):
    x, y = data(rank, step)
    optimizer.zero_grad()
    ((model(x) - y) ** 2).mean().backward()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 123.0  # a scheduler that has moved on


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(rank, case, world_size, **more):
    """z after every step and after leaving, (steps + 1, 8)."""
    run, _ = split_case(case)
    model = make_model(seed=rank)  # made equal when entering
    optimizer = make_optimizer(model, run["momentum"])
    seen = []
    with make_sync(model, optimizer, case, world_size, **more) as sync:
        for step in range(NUM_STEPS):
            take_step(model, optimizer, run["rates"][step], rank, step)
            sync.step()
            if step == run["sync_after"]:
                sync.sync()
            seen.append(flat(model))
    return torch.stack([*seen, flat(model)])


def resume(rank, case, n):
    def make(seed):
        model = make_model(seed)
        optimizer = make_optimizer(model, case.get("momentum", 0.9))
        return model, optimizer, make_sync(model, optimizer, case, n)

    def step_of(model, optimizer, step):
        take_step(model, optimizer, (0.1, 0.2), rank, step)

    return resumed_in_two_ways(make, step_of, NUM_STEPS)


def gradient(z, rank, step):
    x, y = data(rank, step)
    residual = x @ z[:6].view(2, 3).T + z[6:] - y
    return torch.cat([(2 * residual.T @ x / residual.numel()).flatten(), 2 * residual.sum(0) / residual.numel()])


def mixed(x, matrix, wire_dtype=None):
    """sum_j P_ij x_j, with messages in the precision of the wire and rounding errors kept by the sender."""
    n = len(x)
    result = [torch.zeros_like(v) for v in x]
    for j in range(n):
        message = matrix[j, j] * x[j]
        if wire_dtype == "bfloat16":
            message = message.to(torch.bfloat16).double()
        receivers = [i for i in range(n) if i != j and matrix[i, j] > 0]
        for i in receivers:
            result[i] += message
        result[j] += x[j] - len(receivers) * message
    return result


def distance(z):
    mean = sum(z) / len(z)
    return (sum(((v - mean) ** 2).sum() for v in z) / len(z)).sqrt().item()


def reference(n, case):
    """What `train` returns, (n, steps + 1, 8), and the number of extra rounds."""
    run, options = split_case(case)
    slow = run["slowmo"] and {"slow_lr": 1.0, "average": True, **run["slowmo"]}
    topology = options["topology"] and options["topology"](n)
    if topology is None:
        topology = ExponentialTopology(n)
    pair = options["quasi_global_momentum"]
    beta, mu = pair if isinstance(pair, tuple) else (pair, pair)
    x = [flat(make_model()) for _ in range(n)]
    w = [torch.ones(1, dtype=torch.float64) for _ in range(n)]
    momentum, mhat, v = ([torch.zeros(8, dtype=torch.float64) for _ in range(n)] for _ in range(3))
    x0, previous, rounds, extra_rounds, seen = copy.deepcopy(x), None, 0, 0, []

    def z():
        return [a / b for a, b in zip(x, w)]

    def mean():
        x[:] = [sum(x) / n] * n
        w[:] = [torch.ones(1, dtype=torch.float64)] * n

    def outer_step(rates):
        if slow["average"]:
            mean()
        for i in range(n):
            factor = torch.where(previous > 0, rates / previous, 1.0) if previous is not None else 1.0
            v[i] = slow["slow_momentum"] * factor * v[i] + (x0[i] - x[i] / w[i])
            x0[i] = x0[i] - slow["slow_lr"] * v[i]
            x[i] = x0[i] * w[i]

    local_steps = 0
    for step in range(NUM_STEPS):
        rates = torch.tensor(run["rates"][step], dtype=torch.float64)[GROUP]
        before, change = z(), []
        for i in range(n):
            g = gradient(before[i], i, step)
            if pair is not None:
                change.append(rates * (beta * mhat[i] + g))
            else:
                momentum[i] = run["momentum"] * momentum[i] + g
                change.append(rates * momentum[i])
        stepped = [a - d for a, d in zip(x, change)]
        if (step + 1) % options["sync_every"]:
            x = stepped
        else:
            if options["push_sum"]:
                x = mixed(stepped, topology.mixing_matrix(rounds), options["wire_dtype"])
                w = mixed(w, topology.mixing_matrix(rounds))
            else:
                x = mixed(x, topology.mixing_matrix(rounds), options["wire_dtype"])
                x = [a - d for a, d in zip(x, change)]
            rounds += 1
            target, extra = options["consensus_target"], 0
            on = target is not None and step + 1 <= (options["consensus_until_step"] or NUM_STEPS)
            while on and extra < options["max_extra_rounds"] and distance(z()) > target:
                x = mixed(x, topology.mixing_matrix(rounds), options["wire_dtype"])
                w = mixed(w, topology.mixing_matrix(rounds))
                rounds, extra = rounds + 1, extra + 1
            extra_rounds += extra
        for i in range(n):
            if pair is not None:
                moved = torch.where(rates > 0, (before[i] - z()[i]) / rates, 0.0)
                mhat[i] = torch.where(rates > 0, mu * mhat[i] + (1 - mu) * moved, mhat[i])
        local_steps += 1
        if slow and local_steps == slow["sync_every"]:
            outer_step(rates)
            previous, local_steps = rates, 0
        if step == run["sync_after"]:
            mean()
        seen.append(z())
    if slow and local_steps:
        outer_step(rates)
    if not slow and NUM_STEPS % options["sync_every"]:
        x = mixed(x, topology.mixing_matrix(rounds), options["wire_dtype"])
        w = mixed(w, topology.mixing_matrix(rounds))
    mean()
    seen.append(z())
    return torch.stack([torch.stack(at_step) for at_step in seen], 1), extra_rounds
