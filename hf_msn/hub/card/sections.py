"""The sections of a model card that tell of one checkpoint: use, training, conversion, limits, licence."""

from typing import Any

from ...privacy import public_name
from . import replicas
from .facts import CheckpointFacts
from .text import citations, data_name, duration, escaped, fenced

METHODS = {
    "msn": "without labels by Masked Siamese Networks (MSN)",
    "paws": "with a few labels by PAWS",
    "suncet": "with a few labels by SimCLR + SuNCEt",
    None: "by a method that its files do not name",
}
_MOST_SHOWN = 12


def uses(facts: CheckpointFacts, where: str, on_hub: bool) -> list[dict[str, str]]:
    """How to load the checkpoint with each library that can: title and three lines."""
    of_folder = _uses_of_folder(facts, where, on_hub)
    if not facts.replicas:
        return of_folder
    alone = [{**one, "title": f"The first replica alone. {one['title']}"} for one in of_folder]
    return [replicas.use(facts, _quoted(where)), *alone]


def _uses_of_folder(facts: CheckpointFacts, where: str, on_hub: bool) -> list[dict[str, str]]:
    name = _quoted(where)
    of_timm = facts.model_type == "timm"
    output = ").pooler_output" if of_timm else ", output_hidden_states=True).hidden_states[-1][:, 0]"
    through_transformers = {
        "title": "With transformers, where hf_msn need not be installed:",
        "code": "from transformers import AutoImageProcessor, AutoModel\n\n"
        f"processor, model = (kind.from_pretrained({name}) for kind in (AutoImageProcessor, AutoModel))\n"
        f'features = model(**processor(image, return_tensors="pt"){output}',
    }
    classifies = {
        "title": "With transformers, where hf_msn need not be installed:",
        "code": "from transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model={name})\n'
        "print(classify(image))",
    }
    hub = "hf-hub" if on_hub else "local-dir"
    through_timm = {
        "title": "With timm:",
        "code": "import timm\n\n"
        f'model = timm.create_model("{hub}:{where}", pretrained=True).eval()\n'
        "features = model.forward_head(model.forward_features(pixels), pre_logits=True)",
    }
    through_ours = {
        "title": "With hf_msn, the features that its evaluation measures:",
        "code": "from hf_msn import extract_features, load_images, load_vision_model\n\n"
        f"model = load_vision_model({name})\n"
        'features = extract_features(model, load_images("path/to/images")).features',
    }
    if of_timm or facts.is_classifier:
        with_transformers = [classifies if facts.is_classifier else through_transformers]
        return [*(with_transformers if facts.has_image_processor else []), *([through_timm] if of_timm else [])]
    if facts.pretraining_class is not None:
        with_heads = {
            "title": "With hf_msn, to train on with its heads:",
            "code": f"from hf_msn import {facts.pretraining_class}\n\n"
            f"model = {facts.pretraining_class}.from_pretrained({name})\n"
            "encoder = model.evaluation_encoder",
        }
        return [through_ours, with_heads] if facts.has_image_processor else [with_heads]
    if not facts.has_image_processor:
        return []
    return [through_transformers, through_ours] if facts.model_type == "vit_msn" else [through_ours]


def training(facts: CheckpointFacts) -> str:
    """What `run.json` says, and nothing that it does not."""
    run = facts.run
    if not run:
        told = "Nothing here tells how these weights were trained" + (
            ": a conversion knows the file alone." if facts.kind == "converted" else "; no `run.json` is beside them."
        )
        return "\n\n".join([told, *replicas.codistillation(facts)])
    data, labelled, hardware, batch = (run.get(name) or {} for name in ("data", "labelled", "hardware", "batch"))
    rows = {
        "method": run.get("method"),
        "started from": run.get("start") or (run.get("recipe") or {}).get("from_backbone"),
        "steps": _of(run.get("steps"), run.get("planned_steps")),
        "epochs": run.get("epochs"),
        "images an update": batch.get("images_per_update"),
        "precision": run.get("precision"),
        "seed": run.get("seed"),
        "versions": ", ".join(f"{name} {number}" for name, number in (run.get("versions") or {}).items()),
    }
    shown = {name: escaped(value) for name, value in rows.items() if value not in (None, "")}
    if data:
        shown["data"] = data_name(data) + _images(data)
    if labelled:
        shown["labelled images"] = data_name(labelled) + _images(labelled)
    if hardware:
        ranks, cores = hardware.get("ranks"), hardware.get("cpu_count")
        device = escaped(hardware.get("device_name") or hardware.get("device") or "unknown")
        shown["hardware"] = device + (f", {escaped(ranks)} rank{'' if ranks == 1 else 's'}" if ranks else "")
        shown["hardware"] += f", {escaped(cores)} CPU cores" if cores else ""
    if run.get("sync"):
        settings = {key: value for key, value in run["sync"].items() if key != "method" and value is not None}
        listed = ", ".join(f"{escaped(key)} {escaped(value)}" for key, value in settings.items())
        shown["communication"] = escaped(run["sync"].get("method")) + (f": {listed}" if listed else "")
    if isinstance(run.get("wall_time_seconds"), (int, float)):
        shown["wall time of training"] = duration(run["wall_time_seconds"])
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())]
    parts = ["\n".join(table)]
    if run.get("recipe"):
        parts += [
            "The recipe's fields as they were given; the others have their defaults:",
            fenced(run["recipe"]),
        ]
    elif run.get("arguments"):
        parts += ["Training arguments that are not the defaults:", fenced(run["arguments"])]
    return "\n\n".join([*parts, *replicas.codistillation(facts)])


def conversion(facts: CheckpointFacts) -> str:
    """What `conversion.json` says: source, what was kept, left out and made up."""
    said = facts.conversion or {}
    source = said.get("source") or {}
    rows = {
        "converted from": public_name(str(source["file"])) if source.get("file") else None,
        "SHA-256 of that file": source.get("sha256"),
        "method": said.get("method"),
        "architecture": said.get("architecture"),
        "attention heads": said.get("num_attention_heads"),
        "epoch of training": said.get("epoch"),
        "kept": _listed(said.get("kept")),
        "left out": _listed(said.get("left_out")),
        "made up": _listed(said.get("made_up")),
    }
    lines = [f"| {name} | {escaped(value)} |" for name, value in rows.items() if value not in (None, "")]
    if said.get("heads_assumed"):
        lines.append("| note | the file does not tell the number of heads; 64 dimensions a head are assumed |")
    return "\n".join(["| | |", "|---|---|", *lines])


def limits(facts: CheckpointFacts, measured: bool) -> str:
    """What a user must not expect."""
    lines = [
        "Accuracy on other images than those measured above is not known, nor how it differs between groups of people."
        if measured
        else "Nothing was measured: neither accuracy, nor how it differs between groups of people.",
    ]
    data = facts.run.get("data") or {}
    if data.get("name"):
        lines.append(f"It learnt from {data_name(data)}{_images(data)}, and has what biases these images have.")
    if facts.has_image_processor:
        lines.append("Features are right only for images prepared by its `preprocessor_config.json`.")
    size = facts.config.get("image_size")
    if isinstance(size, int) and size < 64:
        lines.append(f"It was made for images of {size} pixels, and is no encoder of photographs.")
    if facts.is_classifier:
        lines.append("It knows the classes that it was trained on, and gives one of them to any image.")
    if facts.replicas and measured:
        lines.append("What is under Results was measured on the first replica alone, not on the average.")
    if (facts.conversion or {}).get("made_up"):
        lines.append(f"Not from the converted file, but made up: {escaped(_listed(facts.conversion['made_up']))}.")
    return "\n".join(f"- {line}" for line in lines)


def licence(facts: CheckpointFacts, license: str | None) -> str:
    """The licence that was stated, and that of the origin."""
    said = f"`{license}`." if license else "None is stated: ask whoever published it before you use it."
    if facts.kind == "converted":
        said += " Converting changes no licence: that of the original checkpoint holds."
    return said


def citation(facts: CheckpointFacts) -> str:
    """BibTeX of the method, and of how the ranks were trained together."""
    names = [facts.method] if facts.method else ["msn"] if facts.model_type == "vit_msn" else []
    if facts.finetuning is not None and facts.finetuning.said["head"] == "suncet" and "suncet" not in names:
        names.append("suncet")
    sync = facts.run.get("sync") or {}
    names += [paper for prefix in ("", "base ") if (paper := _sync_paper(sync, prefix)) and paper not in names]
    if facts.codistillation is not None and "codistillation" not in names:
        names.append("codistillation")
    return citations(names) if names else "The files of this checkpoint name no method to cite."


def _sync_paper(sync: dict[str, Any], prefix: str) -> str | None:
    """The paper of a method of training with little communication, or of its base."""
    method, pushes = sync.get(f"{prefix}method"), sync.get(f"{prefix}push_sum")
    if method == "Gossip" and pushes is False:
        return "d_psgd"
    if method == "AsyncGossip":
        return "async_push" if sync.get(f"{prefix}async_method") == "push_sum" else "ad_psgd"
    names = {"LocalSGD": "local_sgd", "SlowMo": "slowmo", "Gossip": "gossip", "OverlapGossip": "gossip"}
    return {**names, "Codistillation": "codistillation"}.get(str(method))


def _quoted(text: str) -> str:
    return repr(text).replace("'", '"')


def _images(data: dict[str, Any]) -> str:
    count = data.get("num_images")
    return f" ({count:,} images)" if isinstance(count, int) else ""


def _of(done: Any, planned: Any) -> str | None:
    if done is None:
        return None
    return f"{done} of {planned} planned" if planned not in (None, done) else str(done)


def _listed(names: Any) -> str | None:
    if not isinstance(names, (list, tuple)):
        return names
    shown = ", ".join(str(name) for name in names[:_MOST_SHOWN])
    return shown + (f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else "")
