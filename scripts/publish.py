"""Publish a checkpoint on the Hugging Face Hub, with a card of measured numbers. Log in first: hf auth login.

python scripts/publish.py --checkpoint runs/mine --repo_id user/name --results low_shot.json --dry_run true
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser
from transformers.utils import logging

from hf_msn import publish_checkpoint


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class PublishingArguments:
    checkpoint: str = field(metadata={"help": "Folder of a pretraining, fine-tuned, converted or exported model."})
    repo_id: str = field(metadata={"help": "user/name; made if it is not there."})
    what: Literal["backbone", "classifier", "pretraining"] | None = option(
        "backbone: the encoder, for plain transformers or timm; what a pretraining checkpoint is published as by "
        "default. pretraining: with heads and prototypes, for hf_msn. classifier: a fine-tuned one. By default all "
        "but pretraining checkpoints go up as they are."
    )
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Result files of scripts/evaluate_low_shot.py --output, measured on this very model."},
    )
    without_results: bool = option("Publish without measured numbers; the card says so.", False)
    figures: list[str] = field(default_factory=list, metadata={"help": "PNG files for the card."})
    private: bool | None = option("true: only you see a new repo. One that is there is never changed.")
    revision: str = option("Branch; made if it is not there.", "main")
    license: str | None = option("Of the weights, as the card says it: apache-2.0, cc-by-nc-4.0, ...")
    tags: list[str] = field(default_factory=list, metadata={"help": "For the card, besides its own."})
    update: bool = option("Replace another model that the branch holds.", False)
    commit_message: str | None = option("Of the commit.")
    dry_run: bool = option("Only list what would go up: no token, no connection.", False)


def main() -> None:
    (args,) = HfArgumentParser(PublishingArguments, description=__doc__).parse_args_into_dataclasses()
    logging.set_verbosity_warning()
    publication = publish_checkpoint(**vars(args))
    print(publication.table())
    print(f"Published: {publication.url}" if publication.url else "Dry run: nothing was sent.")


if __name__ == "__main__":
    main()
