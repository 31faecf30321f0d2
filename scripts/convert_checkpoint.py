"""Convert the papers' own checkpoints of MSN and PAWS to models that `from_pretrained` loads, and back.

python scripts/convert_checkpoint.py --input vits16_800ep.pth.tar --output runs/vits16
python scripts/convert_checkpoint.py --input vits16_800ep.pth.tar --export_backbone runs/trunk
python scripts/convert_checkpoint.py --to_original --input runs/vits16 --output vits16.pth.tar
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from hf_msn import convert_checkpoint, convert_to_original


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class ConversionArguments:
    input: str = field(metadata={"help": "The original file (.pth.tar); with --to_original a folder or Hub id."})
    output: str | None = option("Folder to write, new or empty; with --to_original the file.")
    num_attention_heads: int | None = option("Of a ViT, where it is not its width / 64.")
    method: Literal["msn", "paws"] | None = option("For a bare state dict of a ViT, which does not show its method.")
    projection_activation: Literal["relu", "gelu"] | None = option("Of the heads of PAWS; relu if not given.")
    export_backbone: str | None = option("Folder to write the encoder alone to, which loads without hf_msn.")
    to_original: bool = option("The way back: write a model in the form of the original code.", False)
    module_prefix: bool | None = option("With --to_original: names begin with 'module.'. As in the source by default.")
    target_only: bool | None = option(
        "With --to_original: leave MSN's online encoder out. As in the source by default."
    )


def main() -> None:
    (args,) = HfArgumentParser(ConversionArguments, description=__doc__).parse_args_into_dataclasses()
    forwards = ("num_attention_heads", "method", "projection_activation", "export_backbone")
    misplaced = [name for name in forwards if args.to_original and getattr(args, name) is not None]
    misplaced += [
        name for name in ("module_prefix", "target_only") if not args.to_original and getattr(args, name) is not None
    ]
    if misplaced:
        raise ValueError(
            f"`--{misplaced[0]}` {'does not go' if args.to_original else 'goes only'} with --to_original."
        )
    if args.to_original:
        if args.output is None:
            raise ValueError("`--to_original` needs `--output`, the file to write.")
        written = convert_to_original(
            args.input, args.output, module_prefix=args.module_prefix, target_only=args.target_only
        )
    else:
        written = convert_checkpoint(
            args.input,
            args.output,
            args.num_attention_heads,
            method=args.method,
            projection_activation=args.projection_activation,
            export_backbone_dir=args.export_backbone,
        )
    print(f"Wrote {written}")


if __name__ == "__main__":
    main()
