import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs `main` of a benchmark with a command line and returns what it printed."""
    threads = torch.get_num_threads()

    def run_main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    yield run_main
    torch.set_num_threads(threads)
