"""The `hf-msn` command. Answers `--help` from a file, as importing torch takes seconds."""

import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..checks import check_choice, check_integer
from .recipe_files import FlagParser, read_config

HELP = Path(__file__).parent / "help"
# The field of a command that decides which other fields there are, and its default.
VARIANTS = {"pretrain": ("method", "msn"), "finetune": ("head", "linear")}
COMMANDS = {
    "pretrain": "Pretrain an image encoder: MSN and BYOL without labels, PAWS and SimCLR + SuNCEt with a few.",
    "finetune": "Fine-tune on labelled images: a linear classifier, or encoder and projection head by SuNCEt.",
    "evaluate": "Measure the accuracy of a frozen model with a few labelled images per class.",
    "app": "Open a page where a few labelled images per class become a classifier, in the browser.",
    "find-compression": "Measure which sequence compression makes a run cheapest, and write its schedule.",
    "plan-sync": "Predict which method of low-communication training is fast on a network.",
    "publish": "Publish a checkpoint on the Hugging Face Hub, with a card of measured numbers.",
    "convert": "Convert the papers' checkpoints of MSN and PAWS, and back.",
    "card": "Write the model card of a checkpoint.",
}
# The commands that run on several processes.
_DISTRIBUTED = ("pretrain", "finetune", "evaluate")
# A fault of all ranks is shown by rank 0 alone: the launcher ends the others meanwhile.
_PRECEDENCE_SECONDS = 5


def run(command: str | None = None) -> None:
    """Run the command line of this process: that of `hf-msn`, or of a script that is one command of it."""
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    show_messages_alone(arguments)
    main(arguments)


def run_script(main: Callable[[], None]) -> None:
    """Run a script that reads `sys.argv` itself. A wrong input is shown as by [`run`]."""
    sys.argv[1:] = show_messages_alone(sys.argv[1:])
    main()


def show_messages_alone(arguments: list[str]) -> list[str]:
    """Let a wrong input end this process with its message alone, unless there is `--debug`; return the others."""
    others = without_debug(arguments)
    if others == arguments:
        sys.excepthook = show_message
    return others


def without_debug(arguments: list[str]) -> list[str]:
    """Return the arguments without `--debug`. With a value it is the field of `transformers.TrainingArguments`."""
    following = [*arguments[1:], "--"]
    return [word for word, after in zip(arguments, following) if word != "--debug" or not after.startswith("-")]


def show_message(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Write an uncaught error to the standard error stream: of a wrong input the message, of others the traceback."""
    if kind.__name__ == "ChildFailedError" and error.get_first_failure()[1].exitcode > 0:
        return  # the process that failed has written what is wrong; one that was killed has not
    is_input = isinstance(error, (ValueError, OSError, ImportError)) or kind.__module__.startswith("hf_msn.")
    if is_input and str(error):
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(_PRECEDENCE_SECONDS)
        print(_message_of(error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _message_of(error: BaseException) -> str:
    """Return the message of an error, without the traceback that torch adds to one of a loader's worker."""
    in_worker = r"Caught \w+ in DataLoader worker .*Traceback[^\n]*\n(?: [^\n]*\n)+[\w.]+: (.*)"
    found = re.fullmatch(in_worker, str(error), re.DOTALL)
    return str(error) if found is None else found[1].rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn COMMAND ...`, by default with the arguments of this process."""
    if arguments is None:
        run()
        return
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print("usage: hf-msn COMMAND [--FIELD VALUE ...]\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<18}{text}")
        print("\n`hf-msn COMMAND --help` lists the fields of a command.")
        return
    check_choice("command", command, COMMANDS)
    if {"-h", "--help"} & set(rest):
        print(help_file(command, rest).read_text(encoding="utf-8"))
        return
    parser = FlagParser(add_help=False, allow_abbrev=False)
    if command in _DISTRIBUTED:
        parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    launch, rest = parser.parse_known_args(rest)
    if check_integer("num_processes", getattr(launch, "num_processes", 1)) > 1:
        launch_processes(launch.num_processes, [command, *rest])
    else:
        rest = without_debug(rest)
        if command in VARIANTS and int(os.environ.get("RANK", 0)) == 0:
            show_info_lines()
        importlib.import_module(f".{command.replace('-', '_')}", __package__).main(rest)


def show_info_lines() -> None:
    """Write the info lines of the package, such as those of a resume, to the standard error stream."""
    logger = logging.getLogger("hf_msn")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def help_file(command: str, arguments: list[str]) -> Path:
    """Return the file with the help of a command, for the method or head that the arguments name."""
    if command not in VARIANTS:
        return HELP / f"{command}.txt"
    field, default = VARIANTS[command]
    _, _, variant = read_config(arguments, field, default)
    known = {path.stem.removeprefix(f"{command}_"): path for path in sorted(HELP.glob(f"{command}_*.txt"))}
    return known[check_choice(field, variant, known)]


def launch_processes(num_processes: int, arguments: list[str]) -> None:
    """Run this command on several processes of this machine, by `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    # without --multi_gpu accelerate starts a single process on a CPU; port 0 is a free one
    options = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module"]
    # its line says only that a process has failed, which has said why
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    launch_command(launch_command_parser().parse_args([*options, "hf_msn.cli.main", *arguments]))


if __name__ == "__main__":
    main()
