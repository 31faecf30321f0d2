"""A small classifier whose replicas train, for the tests of codistillation."""

import math
import time

import torch
import torch.distributed as dist

from hf_msn.distributed.codistillation import Codistillation

B, C, D = 5, 4, 3  # rows, classes, inputs


def data(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(B, D, generator=generator).double()
    return {"x": x, "labels": torch.randint(C, (B,), generator=generator)}


class Classifier(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(D, C)
        self.double()

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels)}


def make(seed, **options):
    model = Classifier(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return model, optimizer, Codistillation(model, optimizer, **options)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def take_steps(model, optimizer, codistillation, steps, data_seed, seconds=0.0, unwrapped=None):
    """Per step: parameters before, gradients, the loss, its age and its distance."""
    seen = []
    for step in steps:
        batch, before = data(data_seed, step), values(unwrapped or model)
        output = model(**batch)
        loss = codistillation.loss(output, batch)
        staleness = codistillation.staleness
        optimizer.zero_grad()
        (output["loss"] + loss).backward()
        optimizer.step()
        gradients = {name: p.grad.clone() for name, p in (unwrapped or model).named_parameters()}
        codistillation.step()
        seen.append((before, gradients, loss.item(), staleness, codistillation.distance_of_predictions))
        time.sleep(seconds)
    return seen


def softmax(row, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def logits_by_loops(parameters, row):
    weight, bias = parameters["linear.weight"].tolist(), parameters["linear.bias"].tolist()
    return [sum(w * x for w, x in zip(weight[c], row)) + bias[c] for c in range(C)]


def gradient_by_loops(own, peers, batch, alpha, distance="kl", temperature=1.0, top_k=None):
    """Of L(y, f_i(x)) + alpha / (n - 1) sum_j D(f_i(x), sg f_j(x)) by weight and bias of a linear f."""
    weight, bias = torch.zeros(C, D).double(), torch.zeros(C).double()
    for row, label in zip(batch["x"].tolist(), batch["labels"].tolist()):
        logits = logits_by_loops(own, row)
        by_logits = [(q - (c == label)) / B for c, q in enumerate(softmax(logits))]
        for peer in peers:
            others = logits_by_loops(peer, row)
            p, q = softmax(others, temperature), softmax(logits, temperature)
            largest = sorted(range(C), key=lambda c: -p[c])[:top_k]
            rest_p, rest_q = (sum(r[c] for c in range(C) if c not in largest) for r in (p, q))
            for c in range(C):
                if distance == "mse":
                    derivative = 2 * (logits[c] - others[c]) / C
                elif c in largest:
                    derivative = temperature * (q[c] - p[c])
                else:
                    derivative = temperature * (q[c] - rest_p * q[c] / rest_q)
                by_logits[c] += alpha / len(peers) * derivative / B
        for c in range(C):
            bias[c] += by_logits[c]
            for d in range(D):
                weight[c, d] += by_logits[c] * row[d]
    return {"linear.weight": weight, "linear.bias": bias}


def groups_of(rank):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "inner"))
    return {"group": mesh.get_group("replica"), "inner_group": mesh.get_group("inner")}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
