"""Local SGD: every rank for itself, and now and then the average."""

import warnings

from .local_update import LocalUpdate


class LocalSGD(LocalUpdate):
    """Averages the parameters over the ranks every `sync_every` optimizer steps.

        x_i <- mean_j x_j        after every `sync_every` local steps

    [arXiv 1805.09767](https://arxiv.org/abs/1805.09767); post-local with `sync_start_step`. With `sync_every=1` and
    plain SGD it is training with averaged gradients, in one more rounding. On one rank it is a no-op, and says so.
    Arguments, consensus and errors are those of [`LocalUpdate`].

    Example:

    ```python
    with LocalSGD(model, optimizer, sync_every=12) as sync:
        ...
        optimizer.step()
        sync.step()
    ```
    """

    def start(self) -> "LocalSGD":
        if all(exchange.size == 1 for exchange in self._exchanges):
            warnings.warn("LocalSGD has one rank only: it trains as without it.", stacklevel=2)
        return super().start()

    def _take_outer_step(self) -> None:
        self._average_over_group()
