"""`hf-msn card`: the model card of a checkpoint, on this machine only."""

from ..hub.cards import create_model_card, save_model_card
from .parser import Parser, arguments_for, call, options_of

_NAMES = {"model_name": "name"}


def make_parser() -> Parser:
    """Return the parser of the command."""
    return Parser(
        {"card": [*options_of(create_model_card, names=_NAMES), *options_of(save_model_card)]},
        prog="hf-msn card",
        usage="hf-msn card --checkpoint FOLDER --results FILE [--FIELD VALUE ...]",
        description="Write the model card of a checkpoint from measured results. Nothing is uploaded.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn card`."""
    values = make_parser().read_complete(arguments)
    card = arguments_for(create_model_card, values, _NAMES)
    print(*call(save_model_card, values, _NAMES, **card), sep="\n")
