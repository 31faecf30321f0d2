"""`hf-msn convert`: the papers' checkpoints of MSN and PAWS to models that `from_pretrained` loads, and back."""

from ..hub.convert import convert_checkpoint, convert_to_original
from .parser import Option, Parser, call, options_of, parameters_of

_NAMES = {"input_path": "input", "output_dir": "output", "export_backbone_dir": "export_backbone"}
_NAMES_BACK = {"model": "input", "output_path": "output"}


def make_parser() -> Parser:
    """Return the parser of the command."""
    forward = options_of(convert_checkpoint, names=_NAMES)
    back = options_of(convert_to_original, names=_NAMES_BACK)
    for option in forward:
        if option.name == "output":
            option.default = None  # `--export_backbone` alone needs no other folder
    return Parser(
        {
            "conversion": forward,
            "the way back": [Option("to_original", bool, False, "Write a model as the original code does."), *back],
        },
        prog="hf-msn convert",
        usage="hf-msn convert --input FILE --output FOLDER [--FIELD VALUE ...]",
        description="Convert an original checkpoint of MSN or PAWS to a model that `from_pretrained` loads. With "
        "--to_original, convert a folder or Hub id back to a file.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn convert`."""
    values = make_parser().read_complete(arguments)
    values.setdefault("output", None)
    is_back = values.pop("to_original", False)
    convert, names = (convert_to_original, _NAMES_BACK) if is_back else (convert_checkpoint, _NAMES)
    fields = [names.get(parameter, parameter) for parameter in parameters_of(convert)]
    for name, value in values.items():
        if value is not None and name not in fields:
            rule = "must not be given" if is_back else "must be given only"
            raise ValueError(f"`{name}` {rule} with `to_original`, but is {value!r}. Leave it out.")
    if is_back and values["output"] is None:
        raise ValueError("`output` is missing: the file to write. Give --output.")
    print(f"Wrote {call(convert, values, names)}")
