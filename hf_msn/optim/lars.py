"""LARS with the learning rate inside the momentum, over the one of timm."""

import timm.optim
import torch


class LARS(timm.optim.Lars):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888, algorithm 1), with the learning rate inside the momentum.

    With the trust ratio r = trust_coeff * ||w|| / (||g|| + weight_decay * ||w|| + eps) of each tensor, and 1 where a
    norm is 0:

        v <- momentum * v + lr * r * (g + weight_decay * w)
        w <- w - v

    `timm.optim.Lars` does all of it, but keeps v without the factor lr and multiplies by the present one, as
    `torch.optim.SGD` does. The two agree while lr is constant; in a warm-up or a cosine, a step that was taken at
    another lr must go on at that one's size. That is all this class changes.

    Args:
        params, lr, momentum, trust_coeff, kwargs: As in `timm.optim.Lars`, with the momentum of the paper as default.
            Tensors of a parameter group are scaled if its `weight_decay` is not 0 or its `always_adapt` is `True`;
            biases and norms belong in a group where neither holds.
    """

    def __init__(self, params, lr: float = 1.0, momentum: float = 0.9, trust_coeff: float = 0.001, **kwargs):
        super().__init__(params, lr=lr, momentum=momentum, trust_coeff=trust_coeff, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step. `closure`, as in every torch optimizer, evaluates the model again and returns the loss."""
        with_momentum = [group for group in self.param_groups if group["momentum"] != 0]
        rates = [group["lr"] for group in with_momentum]
        # timm: v <- momentum * v + (1 - dampening) * r * (g + weight_decay * w);  w <- w - lr * v
        for group in with_momentum:
            group["lr"], group["dampening"] = 1.0, 1.0 - group["lr"]
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(with_momentum, rates):
                group["lr"], group["dampening"] = rate, 0.0
