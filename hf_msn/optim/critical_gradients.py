"""Critical gradients: an optimizer that also takes the largest gradients of the past (arXiv 2106.10708)."""

from typing import Any, Literal

import torch
from torch.optim import Optimizer

from ..checks import check_choice, check_integer, check_number

_STATE = "critical_gradients"
_REPLACEMENTS_PER_SUM = 100  # after which the running sum, which rounds, is computed anew


class CriticalGradients(Optimizer):
    r"""Let any torch optimizer step by its gradient and a buffer of the largest gradients of earlier steps.

    With the buffer b_1 .. b_n of whole gradients, n <= `capacity`, each update takes, in place of g (arXiv 2106.10708,
    section 3),

    | `aggregate` | gradient of the update | used in the paper for |
    |---|---|---|
    | `"sum"` | g + kappa * mean(b) | SGD |
    | `"mid"` | (g + kappa * mean(b)) / 2 | |
    | `"mean"` | (g + kappa * sum(b)) / (n + 1) | RMSprop, Adam |

    and g itself while the buffer is empty. Then g enters the buffer with the priority sum_tensors ||g||: into a free
    place, else in place of the gradient of the smallest priority if its own is greater. At last all priorities are
    multiplied by `decay`.

    It works by hooks of the optimizer that it is given: that one, too, steps by the buffer and saves it. So learning
    rate schedulers, accelerate and a Trainer take either. `.grad` holds the gradient of the update after a step.
    Clipping and averaging over ranks come before it; gradients must be whole at the step, not scaled.

    Memory: `capacity` + 1 times the parameters with a gradient. A step reads one value from the device.

    Args:
        optimizer (`torch.optim.Optimizer`): The rule of the updates.
        capacity (`int`, *optional*, defaults to 5): Gradients in the buffer; 5, 10 or 20 in the paper.
        decay (`float`, *optional*, defaults to 0.7): Factor of the priorities at each step, in (0, 1].
        aggregate (`str`, *optional*, defaults to `"sum"`): See above.
        kappa (`float`, *optional*, defaults to 1.0): Weight of the buffer, >= 0.
        dtype (`torch.dtype`, *optional*): Of the buffer, such as `torch.bfloat16`; by default that of the gradients.

    Raises:
        ValueError: If an argument is out of range, or the optimizer has a buffer already or needs a closure; at a
            step, if gradients are sparse or still scaled; at loading, if the saved buffer has another capacity.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        capacity: int = 5,
        decay: float = 0.7,
        aggregate: Literal["sum", "mean", "mid"] = "sum",
        kappa: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        # Not initialised as an Optimizer: groups and state are those of the one that is wrapped.
        self.capacity = check_integer("capacity", capacity, meaning="counts gradients", remedy="The paper has 5.")
        self.decay = check_number("decay", decay, above=0, maximum=1, remedy="The paper has 0.7, 0.9 and 0.99.")
        self.aggregate = check_choice("aggregate", aggregate, ("sum", "mean", "mid"))
        self.kappa = check_number("kappa", kappa, minimum=0, remedy="The paper has 1.")
        self.dtype = dtype
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("`optimizer` must not need a closure, but is LBFGS: it evaluates several gradients.")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"`optimizer` must be an optimizer of torch, but is {optimizer!r:.80}. Make one first.")
        if _STATE in optimizer.state_dict():
            raise ValueError("`optimizer` has a buffer of critical gradients already. Wrap it once.")
        self.optimizer = optimizer
        self._clear()
        hooked = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
        hooked.register_step_pre_hook(self._before_step)
        hooked.register_state_dict_post_hook(self._add_state)
        hooked.register_load_state_dict_pre_hook(self._take_state)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # before it is set, as in copying
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure=None):
        """Take one step of the optimizer, by its gradients and the buffer."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the optimizer does."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and, as `critical_gradients`, that of the buffer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what [`state_dict`] returned. Without a saved buffer it starts empty."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer. Its gradients of earlier steps count as 0."""
        self.optimizer.add_param_group(param_group)

    def _clear(self) -> None:
        self.priorities: list[float] = []
        self._replacements = 0
        self._kept: dict[int, torch.Tensor] = {}  # (capacity, *shape) by the position of the parameter
        self._sums: dict[int, torch.Tensor] = {}

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:  # args begin with the optimizer
            raise ValueError("`closure` must be None: the gradients must be there before the step. Call it yourself.")
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError("Gradients must not be scaled, but a fused optimizer unscales later. Set fused=False.")
        gradients = {place: p.grad for place, p in enumerate(self._parameters()) if p.grad is not None}
        if not gradients:
            return
        if any(gradient.is_sparse for gradient in gradients.values()):
            raise ValueError("Gradients must be dense, but some are sparse. Use `sparse=False` in the embedding.")
        priority = float(sum(torch._foreach_norm(list(gradients.values()))))
        scale, of_sum = self._coefficients()
        places = [place for place in gradients if place in self._sums]
        past = torch._foreach_mul([self._sums[place] for place in places], of_sum) if places else []
        self._insert(gradients, priority)
        torch._foreach_mul_(list(gradients.values()), scale)
        if past:
            torch._foreach_add_([gradients[place] for place in places], past)  # type: ignore[arg-type]
        self.priorities = [priority * self.decay for priority in self.priorities]

    def _coefficients(self) -> tuple[float, float]:
        """Return the factors of the gradient and of the sum over the buffer."""
        size = len(self.priorities)
        if size == 0:
            return 1.0, 0.0
        if self.aggregate == "mean":
            return 1 / (size + 1), self.kappa / (size + 1)
        scale = 0.5 if self.aggregate == "mid" else 1.0
        return scale, scale * self.kappa / size

    def _insert(self, gradients: dict[int, torch.Tensor], priority: float) -> None:
        if len(self.priorities) < self.capacity:
            slot = len(self.priorities)
            self.priorities.append(priority)
        else:
            slot = min(range(self.capacity), key=self.priorities.__getitem__)
            if not priority > self.priorities[slot]:
                return
            self.priorities[slot] = priority
        for place, gradient in gradients.items():
            if place not in self._kept:
                dtype = self.dtype or gradient.dtype
                self._kept[place] = gradient.new_zeros(self.capacity, *gradient.shape, dtype=dtype)
                self._sums[place] = torch.zeros_like(gradient, dtype=torch.promote_types(dtype, torch.float32))
        slots = [buffer[slot] for buffer in self._kept.values()]
        sums = list(self._sums.values())
        torch._foreach_sub_(sums, [kept.to(total.dtype) for kept, total in zip(slots, sums)])
        for place, kept in zip(self._kept, slots):
            kept.copy_(gradients[place]) if place in gradients else kept.zero_()
        torch._foreach_add_(sums, [kept.to(total.dtype) for kept, total in zip(slots, sums)])
        self._replacements += 1
        if self._replacements % _REPLACEMENTS_PER_SUM == 0:
            for place, buffer in self._kept.items():
                self._sums[place] = buffer.sum(dim=0, dtype=self._sums[place].dtype)

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict | {
            _STATE: {
                "capacity": self.capacity,
                "priorities": list(self.priorities),
                "replacements": self._replacements,
                "buffers": dict(self._kept),
                "sums": dict(self._sums),
            }
        }

    def _take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict.get(_STATE)
        if saved is not None and saved["capacity"] != self.capacity:
            raise ValueError(
                f"`capacity` must be that of the saved buffer, {saved['capacity']}, but is {self.capacity}. Set it so."
            )
        self._clear()
        if saved is not None:
            parameters = self._parameters()
            self.priorities, self._replacements = list(saved["priorities"]), saved["replacements"]
            for own, tensors in ((self._kept, saved["buffers"]), (self._sums, saved["sums"])):
                own |= {place: tensor.to(parameters[place].device, copy=True) for place, tensor in tensors.items()}
        return {name: value for name, value in state_dict.items() if name != _STATE}
