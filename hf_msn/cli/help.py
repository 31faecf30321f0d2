"""Write the help of every command to `help/`, from the parsers: python -m hf_msn.cli.help"""

import importlib

import transformers

from ..files import write_text
from .finetune import HEADS
from .main import COMMANDS, HELP, VARIANTS
from .methods import METHODS


def help_texts() -> dict[str, str]:
    """Return the help of the commands by the name of its file."""
    choices = {"pretrain": METHODS, "finetune": HEADS}
    texts = {}
    for command in COMMANDS:
        make_parser = importlib.import_module(f".{command.replace('-', '_')}", __package__).make_parser
        if command in VARIANTS:
            texts |= {f"{command}_{variant}.txt": make_parser(variant).format_help() for variant in choices[command]}
        else:
            texts[f"{command}.txt"] = make_parser().format_help()
    return texts


if __name__ == "__main__":
    made = help_texts()
    for path in HELP.glob("*.txt"):
        path.unlink()
    for name, text in made.items():
        write_text(HELP / name, text)
    write_text(HELP / "transformers_version", f"{transformers.__version__}\n")
