"""`hf-msn plan-sync`: which method of low-communication training is fast on a network."""

import math
from pathlib import Path

from safetensors import safe_open

from ..distributed.planner import plan_sync
from ..files import write_json
from .parser import Option, Parser, call, options_of, output_file

_BANDWIDTHS = ("10mbit", "30mbit", "100mbit", "300mbit", "1gbit", "3gbit", "10gbit", "30gbit", "100gbit")


def make_parser() -> Parser:
    """Return the parser of the command."""
    options = options_of(plan_sync)
    options[0].default = None  # `--model` has it
    text = "Folder with model.safetensors, such as a checkpoint, whose numbers are counted in place of `parameters`."
    return Parser(
        {
            "network and model": [*options, Option("model", str | None, None, text)],
            "output": [
                Option("json", str | None, None, "File for the table, as JSON."),
                Option("plot", str | None, None, "PNG file: steps per second at 10 Mbit/s to 100 Gbit/s."),
            ],
        },
        prog="hf-msn plan-sync",
        usage="hf-msn plan-sync --parameters 86M --ranks 64 --bandwidth 1gbit --step_seconds 0.4 [--FIELD VALUE ...]",
        description="Predict seconds and bytes per step of every method of low-communication training, and how many "
        "times faster than DDP it is. The prediction is of speed alone: methods differ in the steps to an accuracy.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn plan-sync`."""
    values = make_parser().read_complete(arguments)
    if (values.get("parameters") is None) == (values.get("model") is None):
        raise ValueError(
            "One of `parameters` and `model` must be given, but they are "
            f"{values.get('parameters')} and {values.get('model')}. Give --parameters 86M, or the folder of a model."
        )
    if values.get("model") is not None:
        values["parameters"] = str(_count_numbers(values["model"]))
    if values.get("json") and values.get("json") == values.get("plot"):
        raise ValueError(f"`json` and `plot` must be two files, but both are '{values['json']}'. Rename one.")
    # opened first: a file that cannot be written is an error before any work
    with output_file(values, "json") as table, output_file(values, "plot") as picture:
        rows = call(plan_sync, values, {})
        _print_table(rows)
        if table is not None:
            write_json(table, rows)
        if picture is not None:
            _plot([call(plan_sync, {**values, "bandwidth": bandwidth}, {}) for bandwidth in _BANDWIDTHS], picture)


def _print_table(rows: list[dict]) -> None:
    print(f"{'method':<28}{'s per step':>12}{'times DDP':>12}{'MB per step':>14}{'MB at most':>14}")
    for row in sorted(rows, key=lambda row: row["seconds_per_step"]):
        print(
            f"{row['method']:<28}{row['seconds_per_step']:>12.3f}{row['times_ddp']:>12.2f}"
            f"{row['megabytes_per_step']:>14.2f}{row['megabytes_peak']:>14.2f}"
        )


def _count_numbers(folder: str) -> int:
    """Return the number of all numbers in the safetensors files of a folder. Reads only their headers."""
    total, files = 0, sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"`model` must be a folder with model.safetensors, but is '{folder}'. Give --parameters 86M.")
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _plot(plans: list[list[dict]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. Install it with `pip install 'hf_msn[demo]'`."
        ) from error
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot(xlabel="bandwidth", ylabel="steps per second", yscale="log")
    for number, rows in enumerate(zip(*plans)):
        style = "-" if number < 10 else "--"  # there are ten colours
        axes.plot(_BANDWIDTHS, [1.0 / row["seconds_per_step"] for row in rows], style, label=rows[0]["method"])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(file, format="png", dpi=130)
