"""Write the model card of a checkpoint from measured results, here: nothing is uploaded.

python scripts/evaluate_low_shot.py --model runs/mine --dataset FOLDER --output low_shot.json
python scripts/make_model_card.py --checkpoint runs/mine --results low_shot.json --plot --license apache-2.0
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_msn import save_model_card


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class CardArguments:
    checkpoint: str = field(metadata={"help": "Folder of a pretrained, exported, fine-tuned or converted model."})
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of evaluate_low_shot.py --output, of these weights. finetune.json is found."},
    )
    without_results: bool = option("Make a card that says that nothing was measured.", False)
    output: str | None = option("Folder to write README.md to, by default the checkpoint.")
    name: str | None = option("Name of the model, by default that in --repo_id, else of the folder.")
    repo_id: str | None = option("Where it will be published, owner/name, for the lines that load it.")
    license: str | None = option("Identifier of the Hub: apache-2.0, cc-by-nc-4.0, ... Without it none is stated.")
    base_model: str | None = option("Hub id of the model that it started from, if run.json does not say it.")
    run: str | None = option("Folder whose run.json tells of the training, by default the checkpoint.")
    figures: list[str] = field(default_factory=list, metadata={"help": "PNG files that the card shows."})
    plot: bool = option("Draw accuracy against labels too. Needs matplotlib.", False)
    overwrite: bool = option("Replace a README.md that was not made by this script.", False)


def main() -> None:
    (args,) = HfArgumentParser(CardArguments, description=__doc__).parse_args_into_dataclasses()
    settings = vars(args)
    written = save_model_card(settings.pop("checkpoint"), model_name=settings.pop("name"), **settings)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
