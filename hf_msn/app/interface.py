"""The page of `hf-msn app`, by Gradio, over [`FewLabels`]."""

import os
import tempfile

# read when Gradio is loaded, which tells its makers that it was, and by its pages, which keep inputs in the browser
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("`hf-msn app` needs Gradio, which is not installed: pip install 'hf_msn[app]'.") from error

from . import views
from .actions import Actions
from .few_labels import MAX_MEGABYTES, MAX_MEGAPIXELS, FewLabels, Images

_INTRODUCTION = """# A classifier from a few labels
Give a few images of each class. The frozen encoder `{model}` turns them into features, and logistic regression on
these makes a classifier at once."""
_LIMITS = f"Up to {MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} megapixels each; nothing is kept."
_HOUR = 3600
_FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none is loaded


def build_interface(few_labels: FewLabels) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="hf_msn: a classifier from a few labels", delete_cache=(_HOUR, _HOUR)) as page:
        gr.HTML(views.style_sheet(), padding=False)
        gr.Markdown(_INTRODUCTION.format(model=few_labels.name.replace("`", "")))
        labelled = gr.State(Images(), time_to_live=_HOUR)
        unknown = gr.State(Images(), time_to_live=_HOUR)
        messages = gr.HTML(elem_id="messages")
        with gr.Row():
            with gr.Column(scale=2):
                gr.Markdown(f"### 1. Label a few images\n{_LIMITS}")
                class_name = gr.Textbox(label="Name of the class", max_length=100, elem_id="class-name")
                examples = gr.File(label="Images of this class", file_count="multiple", height=140, elem_id="examples")
                add = gr.Button("Add to the class", variant="primary", elem_id="add")
                shown = gr.HTML(views.show_labelled(Images()), elem_id="labelled")
                with gr.Row():
                    remove = gr.Button("Remove this class", size="sm", elem_id="remove")
                    clear = gr.Button("Remove all", size="sm", elem_id="clear")
                    digits = gr.Button("Example: digits", size="sm", elem_id="digits")
            with gr.Column(scale=3):
                gr.Markdown("### 2. Classify others")
                others = gr.File(label="Images to classify", file_count="multiple", height=140, elem_id="others")
                with gr.Tab("Answers"):
                    answers = gr.HTML(views.show_answers([], []), elem_id="answers")
                with gr.Tab("Map"):
                    mapped = gr.HTML(elem_id="map")
                with gr.Tab("Accuracy with fewer labels"):
                    accuracy = gr.HTML(elem_id="accuracy")
                with gr.Tab("Export"):
                    gr.Markdown(_export_text(few_labels))
                    export = gr.Button("Export the classifier", interactive=few_labels.can_export, elem_id="export")
                    exported = gr.File(label="The classifier", interactive=False, elem_id="exported")

        everything = [labelled, unknown, messages, shown, answers, mapped, accuracy]

        actions = Actions(few_labels)
        add.click(actions.add, [examples, class_name, labelled, unknown], [*everything, examples])
        others.change(actions.classify, [others, labelled], everything)
        remove.click(actions.remove, [class_name, labelled, unknown], everything)
        clear.click(actions.clear, outputs=[*everything, others])
        digits.click(actions.example, outputs=everything)
        export.click(actions.export, [labelled], [exported, messages])
    return page


def launch(few_labels: FewLabels, *, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted. Uploads are in a temporary folder, which is removed at the end.

    Args:
        few_labels ([`FewLabels`]): The encoder.
        host (`str`, *optional*): Address to listen on. By default `GRADIO_SERVER_NAME`, else 127.0.0.1.
        port (`int`, *optional*): Port to listen on. By default `GRADIO_SERVER_PORT`, else a free one from 7860 on.
    """
    with tempfile.TemporaryDirectory(prefix="hf_msn_app_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        build_interface(few_labels).launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_MEGABYTES * 2**20,
            ssr_mode=False,
            theme=gr.themes.Default(**_FONTS),
        )


def _export_text(few_labels: FewLabels) -> str:
    if not few_labels.can_export:
        return "Only checkpoints of hf_msn and ViTMSN models become a classifier that loads without hf_msn."
    return (
        "`classifier.zip` holds encoder, head and image processor in the form of transformers: "
        "`pipeline('image-classification', 'classifier')` loads the unpacked folder, without hf_msn."
    )
