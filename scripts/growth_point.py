"""One point of `benchmark_growth.py`, in processes of its own, so that the peak memory is this point's.

Takes the arguments of `benchmark_step.py`. Writes the seconds of each step and the peak memory of the largest rank.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark_report import machine
from benchmark_step import BenchmarkArguments, measure
from transformers import HfArgumentParser


def peak_memory(cpu: bool) -> float:
    """MiB: the most that tensors took on the GPU, or that this process ever had resident, its imports included."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(max(1, args.threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    imports = peak_memory(args.cpu)
    (precision,) = args.precision
    seconds = measure(args, precision)["hf_msn"]
    peak = torch.tensor(peak_memory(args.cpu))
    if dist.is_initialized():
        peak = peak.cuda() if dist.get_backend() == "nccl" else peak
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        result = {"seconds": seconds, "peak_mib": peak.item(), "imports_mib": imports, "machine": machine()}
        Path(args.output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
