"""`hf-msn find-compression`: the sequence compression of least cost-adjusted error in the course of a run."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..files import read_json, whole_file
from ..trainers.checkpoints import find_fault, list_checkpoints
from ..trainers.find_compression import find_compression, plot_compressions
from .parser import Option, Parser, call, options_of
from .pretrain import RECIPE_FILE, make_recipe, read_recipe

POINTS = (0, 0.25, 0.5, 0.75, 1)
_NAMES = {"trainer": None, "checkpoints": None}


def make_parser() -> Parser:
    """Return the parser of the command."""
    text = "Folder of a run of hf-msn pretrain with checkpoints, such as by --save_strategy steps --save_steps 0.25."
    return Parser(
        {
            "run": [
                Option("run", str, help=text),
                Option(
                    "output", str, help="JSON file for the schedule and what was measured; the picture is beside it."
                ),
            ],
            "measurement": options_of(find_compression, names=_NAMES),
        },
        prog="hf-msn find-compression",
        usage="hf-msn find-compression --run FOLDER --output schedule.json [--FIELD VALUE ...]",
        description="Measure the bias and the cost-adjusted variance of a run's gradients under sequence compression, "
        "at the checkpoints nearest to 0, 25, 50, 75 and 100 %, and write the schedule of least error.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn find-compression`."""
    values = make_parser().read_complete(arguments)
    output = Path(values["output"])
    checkpoints, max_steps = _find_checkpoints(values["run"])
    # opened first: a file that cannot be written is an error before minutes of work
    with (
        whole_file(output, "output", overwrite=True) as file,
        whole_file(output.with_suffix(".png"), "output", overwrite=True) as image,
        tempfile.TemporaryDirectory() as folder,
    ):
        fields = read_recipe(Path(values["run"], RECIPE_FILE)) | {"output_dir": folder, "report_to": "none"}
        recipe = make_recipe(fields | {"compression": None, "low_shot_every_epochs": 0})
        trainer = recipe.build_trainer()
        trainer.state.max_steps = max_steps
        found = call(find_compression, values, _NAMES, trainer=trainer, checkpoints=checkpoints)
        plot_compressions(found["measured"], image)
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["stages"], indent=2))


def _find_checkpoints(run: str) -> tuple[dict[float, Any], int]:
    """Return the whole checkpoints nearest to `POINTS`, by progress, and the updates of the run. `None`: the start."""
    whole = [folder for folder in list_checkpoints(run) if find_fault(folder) is None]
    if not whole or not Path(run, RECIPE_FILE).is_file():
        raise ValueError(
            f"`run` must be the folder of a run of hf-msn pretrain, with {RECIPE_FILE} and whole checkpoints, but "
            f"'{run}' has {len(whole)} of these. Train with --save_strategy steps --save_steps 0.25."
        )
    max_steps = read_json(whole[-1] / TRAINER_STATE_NAME)["max_steps"]
    by_progress = {0.0: None} | {int(folder.name.split("-")[1]) / max_steps: folder for folder in whole}
    nearest = sorted({min(by_progress, key=lambda progress: abs(progress - point)) for point in POINTS})
    return {progress: by_progress[progress] for progress in nearest}, max_steps
