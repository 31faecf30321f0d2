"""Model cards whose numbers were measured on the very weights that they describe."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..evaluation.results import LowShotResults
from ..privacy import find_private, public_name
from .card import replicas, sections
from .card.facts import CheckpointFacts, read_checkpoint
from .card.figures import check_png, plot_low_shot
from .card.measured import model_argument, read_low_shot, weights_of
from .card.metadata import eval_entries, metadata
from .card.text import escaped, finetuning_table, low_shot_definition, low_shot_table

CARD_FILE = "README.md"
EVAL_RESULTS_FILE = ".eval_results/hf_msn.yaml"
_MARKER = "Made by hf_msn from measured results; write it anew rather than editing numbers."
_STAGING = ".card.incomplete"
_MOST_CLASSES = 50


@dataclass(frozen=True)
class _Card:
    card: ModelCard
    entries: list[EvalResultEntry]
    figures: dict[str, Path]


def create_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | Sequence[str | os.PathLike] = (),
    *,
    repo_id: str | None = None,
    figures: Sequence[str | os.PathLike] = (),
    license: str | None = None,
    without_results: bool = False,
    model_name: str | None = None,
    base_model: str | None = None,
    run: str | os.PathLike | None = None,
) -> ModelCard:
    """The model card of a checkpoint: what it is, how it was trained, what was measured, how to use it.

    The kind is found from the files: `finetune.json` makes it fine-tuned, `conversion.json` converted, else it is
    pretrained. Training is told as `run.json` has it; what is not known is left out. Numbers come from files of the
    evaluation and of fine-tuning only, which name the weights that they measured. Paths, tokens and user names are
    never in a card.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of a pretraining checkpoint, an export, a fine-tuned or a converted
            model.
        results (path or `Sequence[path]`, *optional*): Files of `LowShotResults.save`, as
            `scripts/evaluate_low_shot.py --output` writes them. `finetune.json` is read by itself.
        repo_id (`str`, *optional*): Where it is published, `owner/name`, for the lines that load it.
        figures (`Sequence[path]`, *optional*): PNG files that the card shows as `figures/<name>`.
        license (`str`, *optional*): Identifier of the Hub, such as "apache-2.0". Nobody but you knows it.
        without_results (`bool`, *optional*, defaults to `False`): Make a card that says that nothing was measured.
        model_name (`str`, *optional*): By default the name in `repo_id`, else that of the folder.
        base_model (`str`, *optional*): Hub id of the model that it started from; by default what `run.json` says.
        run (`str` or `os.PathLike`, *optional*): Folder whose `run.json` tells of the training; by default
            `checkpoint`. An export has none of its own.

    Returns:
        `huggingface_hub.ModelCard`: With `model-index` in its metadata; [`save_model_card`] adds `.eval_results`.

    Raises:
        ValueError: Results of other weights or another kind, broken or changed by hand; no results without
            `without_results`; a folder that is no checkpoint; an id, a licence or a figure that is none.
    """
    return _make(checkpoint, results, repo_id, figures, license, without_results, model_name, base_model, run).card


def save_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | Sequence[str | os.PathLike] = (),
    *,
    output: str | os.PathLike | None = None,
    plot: bool = False,
    overwrite: bool = False,
    repo_id: str | None = None,
    figures: Sequence[str | os.PathLike] = (),
    license: str | None = None,
    without_results: bool = False,
    model_name: str | None = None,
    base_model: str | None = None,
    run: str | os.PathLike | None = None,
) -> list[Path]:
    """Writes the card of [`create_model_card`] as `README.md`, `.eval_results/hf_msn.yaml` and `figures/`.

    Everything is written beside and then renamed, `README.md` last. A `.eval_results/hf_msn.yaml` of an earlier card
    is replaced, or removed if nothing was measured.

    Args:
        output (`str` or `os.PathLike`, *optional*): Folder to write to; by default `checkpoint`.
        plot (`bool`, *optional*, defaults to `False`): Also draw accuracy against labels into
            `figures/low_shot.png`. Needs matplotlib: `pip install 'hf_msn[demo]'`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a `README.md` that is no card of hf_msn.
        checkpoint, results, repo_id, figures, license, without_results, model_name, base_model, run: As for
            [`create_model_card`].

    Returns:
        `list[Path]`: The files that were written.
    """
    folder = Path(checkpoint if output is None else output)
    card_file = folder / CARD_FILE
    present = card_file.read_text(encoding="utf-8", errors="replace") if card_file.is_file() else _MARKER
    if _MARKER not in present and not overwrite:
        raise ValueError(
            f"'{card_file}' was not made by hf_msn, and would be lost. Move it, give another `output`, or "
            "`overwrite=True`."
        )
    staging = folder / _STAGING
    with tempfile.TemporaryDirectory() as drawings:
        drawn = [plot_low_shot(results, Path(drawings, "low_shot.png"))] if plot else []
        arguments = (license, without_results, model_name, base_model, run)
        made = _make(checkpoint, results, repo_id, [*drawn, *_as_list(figures)], *arguments)
        shutil.rmtree(staging, ignore_errors=True)  # of a killed call
        try:
            _write(made, staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return [folder / name for name in _written(made)]


def _write(made: _Card, staging: Path, folder: Path) -> None:
    (staging / "figures").mkdir(parents=True)
    for name, figure in made.figures.items():
        shutil.copyfile(figure, staging / "figures" / name)
    if made.entries:
        (staging / EVAL_RESULTS_FILE).parent.mkdir()
        text = yaml.safe_dump(eval_result_entries_to_yaml(made.entries), sort_keys=False, allow_unicode=True)
        (staging / EVAL_RESULTS_FILE).write_text(text, encoding="utf-8")
    made.card.save(staging / CARD_FILE)
    (folder / EVAL_RESULTS_FILE).unlink(missing_ok=True)  # of another card
    for name in _written(made):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)


def _written(made: _Card) -> list[str]:
    return [*(f"figures/{name}" for name in made.figures), *([EVAL_RESULTS_FILE] if made.entries else []), CARD_FILE]


def _make(checkpoint, results, repo_id, figures, license, without_results, model_name, base_model, run) -> _Card:
    checkpoint = Path(checkpoint)
    _check_words(repo_id, license, base_model)
    shown = _named_figures(figures)
    facts = read_checkpoint(checkpoint, run)
    measured = [read_low_shot(path, checkpoint) for path in _paths(results)]
    has_results = bool(measured or (facts.finetuning is not None and facts.finetuning.test_accuracy))
    _check_has_results(checkpoint, has_results, without_results)
    weights = weights_of(checkpoint)
    if facts.finetuning is not None and facts.finetuning.said["weights_sha256"] != weights:
        raise ValueError(
            f"'{checkpoint / 'finetune.json'}' measured other weights: {facts.finetuning.said['weights_sha256']}, "
            f"those of '{checkpoint}' are {weights}. Save the fine-tuned model again: `result.save(folder)`."
        )
    name = model_name or (repo_id.split("/")[1] if repo_id else public_name(str(checkpoint.resolve())))
    where = repo_id or f"path/to/{_file_name(name)}"
    data = metadata(facts, measured, weights, model_name=name, license=license, base_model=base_model)
    folder = files("hf_msn.hub.card") / "templates"
    template = "".join((folder / f"{part}.md").read_text(encoding="utf-8") for part in (facts.kind, "sections"))
    card = ModelCard.from_template(
        data,
        template_str=template,
        title=escaped(name),
        architecture=facts.describe_architecture(),
        weights_sha256=weights,
        head=_head(facts) + replicas.head(facts),
        measured=_measured(facts, measured) if has_results else "",
        figures=[{"name": figure, "alt": escaped(Path(figure).stem.replace("_", " "))} for figure in shown],
        uses=sections.uses(facts, where, repo_id is not None),
        training=sections.training(facts),
        limits=sections.limits(facts, has_results),
        licence=sections.licence(facts, license),
        citation=sections.citation(facts),
        marker=_MARKER,
        **_of_kind(facts),
    )
    entries = eval_entries(facts, measured, weights)
    owner = repo_id.split("/")[0] if repo_id else None
    said = f"{card}\n{yaml.safe_dump(eval_result_entries_to_yaml(entries), allow_unicode=True)}"
    private = find_private(said, [checkpoint], owner)
    if private:
        raise ValueError(
            f"The card would have {private}, which must not be published. Take it out of the files of '{checkpoint}', "
            "`model_name` or `results`."
        )
    return _Card(card, entries, shown)


def _of_kind(facts: CheckpointFacts) -> dict[str, object]:
    if facts.kind == "converted":
        method = facts.conversion.get("method") or "a method that its files do not name"
        return {"method": escaped(method), "conversion": sections.conversion(facts)}
    if facts.kind == "pretrained":
        is_classifier = facts.is_classifier and facts.method is None
        what = "An image classifier, trained" if is_classifier else "An image encoder pretrained"
        return {"what": what, "method": sections.METHODS[facts.method]}
    said = facts.finetuning.said
    names = [escaped(name) for name in said.get("class_names") or ()]
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    start = facts.run.get("start")
    return {
        "what": "A classifier" if said["head"] == "linear" else "An encoder with projection head, by SuNCEt,",
        "num_trained": said["num_trained_images"],
        "num_classes": len(said.get("classes") or ()),
        "start": f", starting from {escaped(start)}" if start else "",
        "class_names": ", ".join(names[:_MOST_CLASSES]) + more,
    }


def _head(facts: CheckpointFacts) -> str:
    if facts.pretraining_class is not None:
        return f"\nIt has the heads of pretraining too, and loads as `{facts.pretraining_class}` of hf_msn."
    if facts.is_classifier:
        return "" if facts.finetuning is not None else "\nA classifier is on it."
    return "\nIt is the encoder alone, without a classifier."


def _measured(facts: CheckpointFacts, results: list[LowShotResults]) -> str:
    parts = [] if facts.finetuning is None else [finetuning_table(facts.finetuning)]
    for one in results:
        parts += [low_shot_table(one), low_shot_definition(one)]
        parts.append(f"Weights that were measured: `{one.model['weights_sha256']}`.")
    return "\n\n".join(part for part in parts if part)


def _check_has_results(checkpoint: Path, has_results: bool, without_results: bool) -> None:
    if has_results and without_results:
        raise ValueError("`without_results` is for a card without numbers, but there are results. Leave one out.")
    if not has_results and not without_results:
        raise ValueError(
            f"A card needs results, but none are given for '{checkpoint}'. Measure it: python "
            f"scripts/evaluate_low_shot.py --model {model_argument(checkpoint)} --dataset DATASET --output "
            "low_shot.json, and give that file; or ask for a card that says that nothing was measured: "
            "`without_results=True` (--without_results)."
        )


def _check_words(repo_id: str | None, license: str | None, base_model: str | None) -> None:
    for field, value in (("repo_id", repo_id), ("base_model", base_model)):
        if value is None:
            continue
        try:
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(f"`{field}` must be an id of the Hub, but is {value!r}: {error}") from error
        if "/" not in value:
            raise ValueError(f"`{field}` must be `owner/name`, but is {value!r}. Add the owner.")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"`license` must be an identifier of the Hub such as 'apache-2.0' or 'cc-by-nc-4.0', but is {license!r}."
        )


def _as_list(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str | os.PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _paths(results: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    paths = [Path(path) for path in _as_list(results)]
    twice = {str(path) for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1}
    if twice:
        raise ValueError(f"Each file of results counts once, but {sorted(twice)} is given more often.")
    return paths


def _named_figures(figures: str | os.PathLike | Iterable[str | os.PathLike]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for figure in map(Path, _as_list(figures)):
        check_png(figure)
        name = f"{_file_name(figure.stem)}.png"
        if name in named:
            raise ValueError(
                f"Each figure needs a name of its own, but '{figure}' and '{named[name]}' are both '{name}'."
            )
        named[name] = figure
    return named


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", public_name(name)).strip("-.") or "figure"
