"""`hf-msn app`: a classifier from a few labelled images, in the browser."""

import signal

from ..app.few_labels import FewLabels
from ..evaluation.backbones import load_vision_model
from .parser import Option, Parser, call, options_of


def make_parser() -> Parser:
    """Return the parser of the command."""
    return Parser(
        {
            "model": [*options_of(load_vision_model, names={"name": "model"}), *options_of(FewLabels)],
            "server": [
                Option("host", str | None, None, "Address to listen on, 0.0.0.0 for all. By default this machine's."),
                Option("port", int | None, None, "Port to listen on. By default a free one from 7860 on."),
            ],
        },
        prog="hf-msn app",
        usage="hf-msn app --model MODEL [--FIELD VALUE ...]",
        description="Open a page where a few labelled images per class, dropped into the browser, become a "
        "classifier. Needs Gradio: pip install 'hf_msn[app]'.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn app`."""
    values = make_parser().read_complete(arguments)
    from ..app.interface import launch  # Gradio, which the help does not need; before the model is loaded

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C: no temporary file stays
    launch(call(FewLabels, values, {}), host=values.get("host"), port=values.get("port"))
