"""Critical gradients on two ranks: of the averaged gradient with DDP, each rank's own with local steps."""

import numpy as np
import pytest
import torch
from launch import run_ranks
from torch.nn.parallel import DistributedDataParallel

from hf_msn import CriticalGradients, LocalSGD, SlowMo

pytestmark = pytest.mark.distributed

RATE, CAPACITY, DECAY, SYNC_EVERY, BETA, STEPS = 0.05, 2, 0.7, 3, 0.5, 9
ROWS = torch.randn(STEPS, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)


def _weights_of_this_rank(rank):
    results = {}
    for name in ("ddp", "local", "slowmo"):
        model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        model.weight.data = START.clone()
        module = DistributedDataParallel(model)
        optimizer = CriticalGradients(torch.optim.SGD(model.parameters(), lr=RATE), CAPACITY, DECAY)
        sync = None
        if name == "local":
            sync = LocalSGD(module, optimizer, sync_every=SYNC_EVERY).start()
        elif name == "slowmo":
            sync = SlowMo(module, optimizer, sync_every=SYNC_EVERY, slow_momentum=BETA).start()
        for rows in ROWS:
            module(rows[rank]).square().mean().backward()
            optimizer.step()
            if sync is not None:
                sync.step()
            optimizer.zero_grad()
        if sync is not None:
            sync.stop()
        results[name] = model.weight.detach()
    return results


def step(weight: np.ndarray, rows: np.ndarray, buffer: list) -> np.ndarray:
    """One step of SGD by g and the mean of the buffer, written out."""
    gradient = np.zeros(3)
    for row in rows:
        gradient += 2 * (row @ weight) * row / len(rows)
    taken = gradient + (sum(kept for _, kept in buffer) / len(buffer) if buffer else 0)
    priority = np.linalg.norm(gradient)
    if len(buffer) < CAPACITY:
        buffer.append((priority, gradient))
    else:
        smallest = min(range(CAPACITY), key=lambda place: buffer[place][0])
        if priority > buffer[smallest][0]:
            buffer[smallest] = (priority, gradient)
    buffer[:] = [(DECAY * old, kept) for old, kept in buffer]
    return weight - RATE * taken


def test_two_ranks_equal_the_loop():
    rows = ROWS.numpy()
    start = START.numpy()[0]
    whole, buffer = start, []
    for batch in rows:
        whole = step(whole, batch.reshape(-1, 3), buffer)
    expected = {"ddp": whole}
    for name, beta in (("local", 0.0), ("slowmo", BETA)):
        weights, buffers, outer, velocity = [start, start], [[], []], start, 0
        for number, batch in enumerate(rows):
            weights = [step(weights[rank], batch[rank], buffers[rank]) for rank in range(2)]
            if (number + 1) % SYNC_EVERY == 0:
                velocity = beta * velocity + outer - sum(weights) / 2
                outer = outer - velocity
                weights = [outer, outer]
        expected[name] = outer
    for result in run_ranks(_weights_of_this_rank, 2):
        for name, weight in expected.items():
            np.testing.assert_allclose(result[name][0].numpy(), weight, rtol=1e-10, err_msg=name)
