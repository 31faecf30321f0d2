"""States of training: saved, loaded and compared bitwise."""

import copy
import io

import torch


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed_in_two_ways(make, take_step, num_steps):
    """Train `num_steps` straight on, and after going on from a save at step 4 in two ways.

    `make(seed)` returns a model, its optimizer and its sync object, and `take_step(model, optimizer, step)` steps the
    optimizer. Return the states and models at the end, the straight ones first, and the states at the save.
    """

    def train(model, optimizer, sync, steps):
        for step in steps:
            take_step(model, optimizer, step)
            sync.step()
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return copy.deepcopy(states) | {"sync": saved_and_loaded(sync.state_dict())}

    whole = make(0)
    whole[2].start()
    saved = train(*whole, range(4))
    straight = train(*whole, range(4, num_steps))
    whole[2].stop()
    ends = [(straight, whole[0].state_dict())]
    for started_first in (False, True):
        model, optimizer, sync = make(7)
        if started_first:
            sync.start()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch takes the tensors themselves
        sync.load_state_dict(saved["sync"])
        if not started_first:
            sync.start()
        ended = train(model, optimizer, sync, range(4, num_steps))
        sync.stop()
        ends.append((ended, model.state_dict()))
    return ends, saved


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
