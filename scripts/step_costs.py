"""What a training step costs: its operations, and on which operators its time goes."""

import torch
from benchmark_report import markdown_table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_msn import MSNForPreTraining

_SHOWN = 12


def flops_an_image(model: MSNForPreTraining, batch: dict[str, torch.Tensor]) -> float:
    """Operations of forward and backward pass for one image: products, convolutions and attention, as torch counts.

    They are counted on two images, on the device of the model, which must not be compiled.
    """
    with FlopCounterMode(display=False) as counter:
        model.train()(**{name: views[:2] for name, views in batch.items()}).loss.backward()
    return counter.get_total_flops() / 2


class StepProfile:
    """Notes what runs between `start` and `stop`."""

    def __init__(self):
        on_gpu = torch.cuda.is_available()
        self.time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        self.profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def start(self) -> None:
        self.profiler.start()

    def stop(self) -> None:
        self.profiler.stop()

    def shares(self) -> list[dict]:
        """The operators that took longest: `name`, `calls`, and `share` of the time of all."""
        found = [(getattr(entry, self.time), entry) for entry in self.profiler.key_averages()]
        total = sum(microseconds for microseconds, _ in found)
        longest = sorted(found, key=lambda pair: pair[0], reverse=True)[:_SHOWN]
        return [{"name": e.key, "calls": e.count, "share": microseconds / total} for microseconds, e in longest]


def shares_table(shares: list[dict]) -> str:
    """What `StepProfile.shares` gives, as a table."""
    rows = [[entry["name"], entry["calls"], f"{entry['share']:.1%}"] for entry in shares]
    return markdown_table(["operator", "calls", "of the step"], rows)
