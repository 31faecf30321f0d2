"""Model cards: one template, filled from the files of a checkpoint and from results of its very weights."""

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, Template
from scipy.stats import binomtest

from ..evaluation.results import BASELINE_NAMES, LowShotResults, TaskResult
from ..files import public_name, read_json, whole_file
from ..models.modeling_head_classifier import HeadClassifierConfig
from .figures import plot_low_shot, read_png
from .results import as_paths, count_weights, read_finetuning, read_low_shot, weights_of
from .run_record import read_run

CARD_FILE = "README.md"
EVAL_RESULTS_FILE = ".eval_results/hf_msn.yaml"
_MARKER = "Made by hf_msn from measured results; make it again rather than editing numbers."
# By model type: the class that loads it, and how it learns.
PRETRAINING_METHODS = {
    "msn": ("MSNForPreTraining", "self-supervised"),
    "byol": ("BYOLForPreTraining", "self-supervised"),
    "paws": ("PAWSForPreTraining", "semi-supervised"),
    "suncet": ("SuNCEtForPreTraining", "semi-supervised"),
}
_SYNC_PAPERS = {"LocalSGD": "local_sgd", "SlowMo": "slowmo", "Gossip": "gossip", "OverlapGossip": "gossip"}
_SYNC_PAPERS |= {"DiLoCo": "diloco", "StreamingDiLoCo": "streaming_diloco", "NoLoCo": "noloco"}
_SYNC_PAPERS |= {"AsyncGossip": "ad_psgd", "Codistillation": "codistillation"}


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
    """Make the model card of a checkpoint: its architecture, its training, its measured accuracy, how to load it.

    A checkpoint with `finetune.json` is fine-tuned, one with `conversion.json` is converted, any other is pretrained.
    The training is described as `run.json` has it. Numbers come only from files of the evaluation and of fine-tuning,
    which contain the hash of the weights that they measured.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of a pretraining checkpoint, an export, a fine-tuned or a converted
            model.
        results (path or `Sequence[path]`, *optional*): Files of `LowShotResults.save`. `finetune.json` is found.
        repo_id (`str`, *optional*): Where it is published, `owner/name`, for the lines that load it.
        figures (`Sequence[path]`, *optional*): PNG files that the card shows as `figures/<name>`.
        license (`str`, *optional*): Identifier of the Hub, such as "apache-2.0".
        without_results (`bool`, *optional*, defaults to `False`): Make a card which states that nothing was measured.
        model_name (`str`, *optional*): By default the name in `repo_id`, else that of the folder.
        base_model (`str`, *optional*): Hub id of the model from which it was trained; by default that in `run.json`.
        run (`str` or `os.PathLike`, *optional*): Folder of the `run.json`; by default `checkpoint`.

    Returns:
        `huggingface_hub.ModelCard`: With `model-index` in its metadata; [`save_model_card`] adds `.eval_results`.

    Raises:
        ValueError: If results are of other weights, if there are none without `without_results`, or if a folder, an
            id, a licence or a figure is not valid.
    """
    names: dict[str, Any] = {"repo_id": repo_id, "model_name": model_name, "base_model": base_model}
    made = card_files(
        checkpoint, results, figures=figures, license=license, without_results=without_results, run=run, **names
    )
    return ModelCard(made[CARD_FILE].decode())


def save_model_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | Sequence[str | os.PathLike] = (),
    *,
    output: str | os.PathLike | None = None,
    plot: bool = False,
    overwrite: bool = False,
    figures: Sequence[str | os.PathLike] = (),
    **card: Any,
) -> list[Path]:
    """Write the card of [`create_model_card`] as `README.md`, `.eval_results/hf_msn.yaml` and `figures/`.

    Each file is replaced as a whole, `README.md` last. The `.eval_results/hf_msn.yaml` of an earlier card is removed
    if nothing was measured.

    Args:
        output (`str` or `os.PathLike`, *optional*): Folder to write to; by default `checkpoint`.
        plot (`bool`, *optional*, defaults to `False`): Also draw accuracy against labels into
            `figures/low_shot.png`. Needs matplotlib: `pip install 'hf_msn[demo]'`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a `README.md` that hf_msn did not make.

    The other arguments are those of [`create_model_card`].

    Returns:
        `list[Path]`: The files that were written.
    """
    folder = Path(checkpoint if output is None else output)
    readme = folder / CARD_FILE
    is_ours = not readme.is_file() or _MARKER in readme.read_text(encoding="utf-8", errors="replace")
    if not (is_ours or overwrite):
        raise ValueError(
            f"'{readme}' was not made by hf_msn and would be lost. Give another `output`, or `overwrite`."
        )
    with tempfile.TemporaryDirectory() as drawings:
        drawn = [plot_low_shot(results, Path(drawings, "low_shot.png"))] if plot else []
        made = card_files(checkpoint, results, figures=[*drawn, *as_paths(figures)], **card)
    (folder / EVAL_RESULTS_FILE).unlink(missing_ok=True)
    for name, content in made.items():
        with whole_file(folder / name, overwrite=True) as staging:
            staging.write_bytes(content)
    return [folder / name for name in made]


def card_files(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | Iterable[str | os.PathLike] = (),
    *,
    repo_id: str | None = None,
    figures: Iterable[str | os.PathLike] = (),
    license: str | None = None,
    without_results: bool = False,
    model_name: str | None = None,
    base_model: str | None = None,
    run: str | os.PathLike | None = None,
    tags: Iterable[str] = (),
) -> dict[str, bytes]:
    """Return the files of a card by path, `README.md` last. For the arguments see [`create_model_card`]."""
    _check_names(repo_id=repo_id, base_model=base_model, license=license)
    if run is not None and not Path(run, "run.json").is_file():
        raise ValueError(f"`run` must be a folder with the run.json that training wrote, but '{run}' has none.")
    pictures = {}
    for path in as_paths(figures):
        pictures[f"{_file_name(path.stem)}.png"] = read_png(path)
    measured = [read_low_shot(path, checkpoint) for path in as_paths(results)]
    card = _describe_checkpoint(checkpoint, run)
    finetuning = card["finetuning"] or {}
    is_measured = bool(measured or finetuning.get("test_accuracy"))
    if is_measured == without_results:
        raise ValueError(
            f"`without_results` must be true if and only if nothing was measured, but is {without_results} with "
            f"{len(measured)} files of `results`. Measure with: hf-msn evaluate --model CHECKPOINT --dataset DATASET "
            "--output low_shot.json"
        )
    name = model_name or (repo_id.split("/")[1] if repo_id else Path(checkpoint).resolve().name)
    card |= {
        "title": name,
        "license": license,
        "location": repo_id or f"path/to/{_file_name(name)}",
        "is_on_hub": repo_id is not None,
        "is_measured": is_measured,
        "results": measured,
        "figures": [Path(picture) for picture in pictures],
        "marker": _MARKER,
    }
    evaluated, entries = _evaluations(card)
    card["metadata"] = _metadata(card, evaluated, base_model, tags).to_yaml()
    text = _template().render(card)
    made = {f"figures/{picture}": content for picture, content in pictures.items()}
    if entries:
        plain = eval_result_entries_to_yaml(entries)
        made[EVAL_RESULTS_FILE] = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode()
    return {**made, CARD_FILE: text.encode()}


def _describe_checkpoint(checkpoint: str | os.PathLike, run: str | os.PathLike | None) -> dict[str, Any]:
    """Return the entries of the template that the files of a checkpoint contain."""
    folder = Path(checkpoint)
    config, record = read_json(folder / "config.json"), read_run(folder if run is None else run) or {}
    finetuning = read_finetuning(folder)
    conversion, codistillation = (_optional_json(folder / f"{name}.json") for name in ("conversion", "codistillation"))
    model_type = config.get("model_type", "timm")
    # also of an export, which has no other record
    pretrained_by = config["pretrained_by"] if isinstance(config.get("pretrained_by"), dict) else {}
    sources = ({"method": model_type}, pretrained_by, conversion or {}, record)
    names = [str(source.get("method")).lower() for source in sources]
    method = next((name for name in names if name in PRETRAINING_METHODS), None)
    is_classifier = any("ForImageClassification" in name for name in config.get("architectures") or ())
    return {
        "kind": "finetuned" if finetuning else "converted" if conversion else "pretrained",
        "model_type": model_type,
        "method": method,
        "is_timm": model_type == "timm",
        "is_classifier": bool(config.get("num_classes")) if model_type == "timm" else is_classifier,
        "pretraining_class": PRETRAINING_METHODS.get(model_type, (None,))[0],
        "needs_hf_msn": model_type == HeadClassifierConfig.model_type,
        "has_processor": (folder / "preprocessor_config.json").is_file(),
        "image_size": config.get("image_size") if isinstance(config.get("image_size"), int) else None,
        "architecture": _architecture(config, sum(count_weights(folder).values())),
        "weights_sha256": weights_of(folder),
        "finetuning": finetuning,
        "conversion": conversion,
        "codistillation": codistillation,
        "run": record,
        "settings": _fenced(record.get("recipe") or record.get("arguments")),
        "papers": _papers(
            _methods(model_type, method, {**config, **pretrained_by, **(record.get("recipe") or {})}),
            finetuning,
            codistillation,
            record.get("sync") or {},
        ),
    }


@cache
def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"md": _escaped, "code": _code, "listed": _listed, "span": _span, "duration": _duration}
    environment.filters |= {"public_name": public_name, "penalties": _penalties}
    environment.globals |= {"wilson_interval": _wilson_interval, "baseline_names": BASELINE_NAMES}
    return environment.from_string(files("hf_msn.hub").joinpath("card_template.md").read_text(encoding="utf-8"))


# Metadata


def _metadata(
    card: dict[str, Any], evaluated: list[EvalResult], base_model: str | None, tags: Iterable[str]
) -> ModelCardData:
    record, method = card["run"], card["method"]
    start = record.get("start") or (record.get("recipe") or {}).get("from_backbone")
    data = [(record.get(name) or {}).get("name") for name in ("data", "labelled")]
    plain = "timm" if card["is_timm"] else "transformers"
    library = "hf_msn" if card["pretraining_class"] or card["needs_hf_msn"] else plain
    learning = [method, f"{PRETRAINING_METHODS[method][1]}-learning"] if method else []
    return ModelCardData(
        model_name=card["title"],
        library_name=library,
        pipeline_tag="image-classification" if card["is_classifier"] else "image-feature-extraction",
        tags=list(dict.fromkeys(["hf_msn", "vision", *learning, "few-shot-learning", *tags])),
        license=card["license"],
        base_model=base_model or (start if _is_hub_id(start) else None),
        datasets=list(dict.fromkeys(name for name in data if name and _is_hub_id(name))) or None,
        metrics=["accuracy"] if evaluated else None,
        eval_results=evaluated or None,
    )


def _evaluations(card: dict[str, Any]) -> tuple[list[EvalResult], list[EvalResultEntry]]:
    """Return the accuracies in per cent for `model-index` and, top-1 on data with a name, for `.eval_results`."""
    results, entries = [], []

    def add(data: dict, title: str, task: str, top: str, value: float, how: str, arguments: dict) -> None:
        dataset = _dataset_id(data)
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name=title,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=data.get("split"),
                metric_type="accuracy",
                metric_value=value,
                metric_name=f"{top.replace('top', 'top-')} accuracy [%], {how}",
                metric_args=arguments,
            )
        )
        if top == "top1" and data.get("name"):
            spread = f", std {arguments['std']:.2f}, 95 % +- {arguments['ci95']:.2f}" if "std" in arguments else ""
            counts = f", {arguments['num_test_images']} test images, weights {arguments['weights_sha256'][:16]}"
            task = task if re.fullmatch(r"[\w.-]+", task) else "low_shot"
            notes = f"top-1 [%], {how}{spread}{counts}"
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=notes))

    for one in card["results"]:
        test = one.data["test"]
        for task in one.tasks:
            splits = f"mean of {len(task.splits)} splits" if len(task.splits) > 1 else "1 split"
            how = f"{task.title}, {_probe(one)}, {splits}"
            for top in ("top1", "top5"):
                if top in task.summary:
                    arguments = {"std": task.summary[f"{top}_std"], "ci95": task.summary[f"{top}_ci95"]}
                    arguments |= {"num_splits": len(task.splits), "num_test_images": test["num_images"]}
                    arguments |= {"weights_sha256": one.model["weights_sha256"]}
                    title = "Low-shot image classification"
                    add(test, title, task.name, top, task.summary[top], how, arguments)
    finetuning = card["finetuning"] or {}
    for space, value in (finetuning.get("test_accuracy") or {}).items():
        arguments = {"num_test_images": finetuning["num_test_images"], "weights_sha256": card["weights_sha256"]}
        name = "finetuned" if space == "top1" else f"finetuned_{space}"
        how = f"after fine-tuning on {finetuning['num_trained_images']} labelled images"
        how += "" if space == "top1" else f", {space}"
        add(finetuning.get("test_data") or {}, "Image classification", name, "top1", value, how, arguments)
    return results, entries


def _dataset_id(data: dict[str, Any]) -> str:
    """Return a Hub id, or the bare name of other data, which no benchmark of the Hub has."""
    return re.sub(r"[^\w./-]+", "-", public_name(str(data.get("name") or ""))).strip("-") or "unnamed"


def _probe(results: LowShotResults) -> str:
    name = f"{results.probe.get('probe', 'unknown')} probe".replace("_", " ")
    space = results.settings.get("features", "backbone")
    return name + ("" if space == "backbone" else f" on {space}s")


def _methods(model_type: str, method: str | None, settings: dict[str, Any]) -> set[str]:
    """Return the names of a pretraining method in the template, of BYOL those of its variant."""
    if method == "byol":
        return {"simsiam" if settings.get("ema") is False else "byol", settings.get("predictor") or ""}
    return {method or ("msn" if model_type == "vit_msn" else "")}


def _papers(methods: set[str], finetuning, codistillation, sync) -> set[str]:
    """Return the methods to cite: of the model, and of how the ranks were trained together."""
    papers = {*methods}
    if finetuning is not None and finetuning["head"] == "suncet":
        papers.add("suncet")
    for prefix in ("", "base "):
        paper = _SYNC_PAPERS.get(sync.get(f"{prefix}method"), "")
        if paper == "gossip" and sync.get(f"{prefix}push_sum") is False:
            paper = "d_psgd"
        if paper == "ad_psgd" and sync.get(f"{prefix}async_method") == "push_sum":
            paper = "async_push"
        papers.add(paper)
    if codistillation is not None:
        papers.add("codistillation")
    return papers - {""}


# Content of the template


def _architecture(config: dict[str, Any], num_weights: int) -> str:
    weights = f"{num_weights / 1e6:.3g} million weights in its file"
    timm_name = config.get("timm_model") or config.get("architecture")
    if timm_name is not None:
        return f"`{_code(timm_name)}` of timm, {weights}"
    parts = {
        "num_hidden_layers": "{} blocks",
        "hidden_size": "width {}",
        "num_attention_heads": "{} heads",
        "patch_size": "patches of {} pixels",
        "image_size": "images of {} pixels",
    }
    known = [text.format(config[name]) for name, text in parts.items() if isinstance(config.get(name), int)]
    return ", ".join(["a vision transformer", *known, weights])


def _fenced(settings: dict[str, Any] | None) -> str:
    """Return settings as a block of YAML, fenced by more backticks than any value has."""
    if not settings:
        return ""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}yaml\n{text}\n{fence}"


def _escaped(text: Any) -> str:
    """Return a text as one line of Markdown without markup, HTML and links."""
    line = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(text))).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#|!~$])", r"\\\1", line)
    return re.sub(r"(https?|www)([:.])", r"\1&#8203;\2", line)


def _code(text: Any) -> str:
    """Return the part of a text that may stand in backticks."""
    return re.sub(r"[^\w./:+-]", "", str(text)) if text else "unknown"


def _listed(names: Any) -> Any:
    if not isinstance(names, list):
        return names
    return ", ".join(map(str, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _span(counts: Iterable[int]) -> str:
    counts = sorted(counts)
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _penalties(task: TaskResult) -> list[float]:
    return sorted({split.fit["l2"] for split in task.splits if "l2" in split.fit})


def _wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share in per cent that was seen in `count` images."""
    interval = binomtest(round(accuracy * count / 100), count).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# Checks


def check_repo_id(repo_id: str, name: str = "repo_id") -> None:
    """Raise a `ValueError` unless `repo_id` is "owner/name"."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"`{name}` must be 'owner/name', but is {repo_id!r}. Add the user or the organisation.")


def _check_names(license: str | None, **ids: str | None) -> None:
    for field, value in ids.items():
        if value is not None:
            check_repo_id(value, field)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"`license` must be an identifier of the Hub such as 'apache-2.0', but is {license!r}.")


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "figure"
