"""The Space: `hf-msn app` with the digits encoder beside this file."""

from pathlib import Path

from hf_msn.cli.main import main

main(["app", "--model", str(Path(__file__).parent / "digits_encoder")])
