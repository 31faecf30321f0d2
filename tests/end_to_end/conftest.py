import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hf_msn.cli.main import main


@pytest.fixture
def command(capsys):
    """Run `hf-msn` in this process, which saves importing everything again; return what it prints."""

    def command(*arguments) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return command
