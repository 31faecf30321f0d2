"""`hf-msn publish`: a checkpoint on the Hugging Face Hub, with a card of measured numbers."""

from transformers.utils import logging

from ..hub.publish import publish_checkpoint
from .parser import Parser, options_of


def make_parser() -> Parser:
    """Return the parser of the command."""
    return Parser(
        {"publication": options_of(publish_checkpoint, names={"token": None})},
        prog="hf-msn publish",
        usage="hf-msn publish --checkpoint FOLDER --repo_id USER/NAME --results FILE [--FIELD VALUE ...]",
        description="Publish a checkpoint on the Hugging Face Hub. Log in first: hf auth login. With --dry_run, list "
        "the files without a token or a connection.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn publish`."""
    values = make_parser().read_complete(arguments)
    logging.set_verbosity_warning()
    publication = publish_checkpoint(**values)
    print(publication.table())
    print(f"Published: {publication.url}" if publication.url else "Dry run: nothing was sent.")
