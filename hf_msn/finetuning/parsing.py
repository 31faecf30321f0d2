"""Reads a fine-tuning recipe from a YAML file and the command line."""

import argparse
import dataclasses

from transformers import TrainingArguments

from ..cli.recipe_arguments import without_replaced_labels
from ..cli.recipe_forms import WideHelpFormatter, add_argument, read_mapping, refuse_unknown, typed
from .recipes import HEADS, VIEWS, FinetuningRecipe, finetuning_fields, finetuning_homes, make_finetuning_recipe

# The fields of transformers.TrainingArguments that mean something here, beside those of FinetuningArguments.
_OF_TRAINER = (
    *("output_dir", "warmup_steps", "gradient_accumulation_steps", "bf16", "fp16", "use_cpu", "seed"),
    *("dataloader_num_workers", "disable_tqdm", "report_to", "run_name"),
    *("push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"),
)
_FIXED = ("save_strategy", "remove_unused_columns", "average_tokens_across_devices", "ddp_find_unused_parameters")


def parse_finetuning_recipe(arguments: list[str] | None = None) -> FinetuningRecipe:
    """Reads `--config recipe.yaml` and the fields on the command line, which win over the file.

    Args:
        arguments (`list[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: For an unknown field, with the nearest known one; for a value of the wrong type; for an
            `output_dir` that is not empty where no overwrite is asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    first.add_argument("--head", default=None)
    named, _ = first.parse_known_args(arguments)
    in_file = {}
    if named.config is not None:
        in_file = read_mapping(named.config, "Recipes are in scripts/recipes/finetune_*.yaml.")
    head = named.head or str(in_file.get("head", "linear"))
    fields = _known_fields(head)
    if named.config is not None:
        _refuse_unknown(in_file, head, f"in '{named.config}'")

    namespace, unknown = _build_parser(head).parse_known_args(arguments)
    if unknown:
        _refuse_unknown([unknown[0].lstrip("-").split("=")[0]], head, "on the command line")
    given = {name: value for name, value in vars(namespace).items() if name in fields}
    in_file = without_replaced_labels(in_file, given)
    values = {**in_file, **given}
    return make_finetuning_recipe({name: typed(name, value, fields[name].type) for name, value in values.items()})


def _known_fields(head: str) -> dict[str, dataclasses.Field]:
    known: dict[str, dataclasses.Field] = {}
    for cls in finetuning_homes(head):
        for name, f in finetuning_fields(cls).items():
            if issubclass(cls, TrainingArguments) and not _is_offered(cls, name):
                continue
            known.setdefault(name, f)
    return known


def _is_offered(arguments: type, name: str) -> bool:
    ours = any(name in cls.__annotations__ for cls in arguments.__mro__[: arguments.__mro__.index(TrainingArguments)])
    return name in _OF_TRAINER or (ours and name not in _FIXED)


def _refuse_unknown(names, head: str, where: str) -> None:
    def owner(name: str) -> str | None:
        others = [other for other in HEADS if other != head and name in _known_fields(other)]
        return f"It belongs to `--head {others[0]}`, but the head is {head}." if others else None

    refuse_unknown(names, _known_fields(head), where, owner, "--help")


def _build_parser(head: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch scripts/finetune.py --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        description=f"Fine-tune on labelled images: head {head}. For the other head: --head NAME --help. The best "
        "epoch is chosen on held-out labels and saved at the end; a run is short and is not resumed.",
        epilog="Fields of the command line win over those of the recipe file.",
        formatter_class=WideHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", default=None, help="A recipe: YAML lines `field: value`.")
    known, seen = _known_fields(head), set()
    for cls, title in finetuning_homes(head).items():
        group = parser.add_argument_group(title)
        for name in finetuning_fields(cls):
            if name in seen or name not in known:
                continue
            seen.add(name)
            add_argument(group, known[name], VIEWS.get(name, known[name].default))
    return parser
