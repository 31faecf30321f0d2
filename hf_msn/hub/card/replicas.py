"""What a card says of codistilled replicas: which is published, what the run measured, and how an average loads."""

from typing import Any

from .facts import CheckpointFacts
from .text import escaped

_MOST_METRICS = 50


def head(facts: CheckpointFacts) -> str:
    """Of an average, whose weights those are that lie in the folder itself."""
    if not facts.replicas:
        return ""
    return (
        f"\nPublished is the average of {len(facts.replicas)} codistilled replicas, in `{facts.replicas[0]}/` to "
        f"`{facts.replicas[-1]}/`; the weights above are the first replica's alone."
    )


def use(facts: CheckpointFacts, name: str) -> dict[str, str]:
    """The lines that load an average; `name` in quotes."""
    through_processor = (
        "from hf_msn import PredictionAverage\nfrom transformers import AutoImageProcessor\n\n"
        f"processor, model = (kind.from_pretrained({name}) for kind in (AutoImageProcessor, PredictionAverage))\n"
        'probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(dim=-1)'
    )
    without_processor = (
        "from hf_msn import PredictionAverage\n\n"
        f"model = PredictionAverage.from_pretrained({name})\n"
        "probabilities = model(pixel_values=pixels).logits.softmax(dim=-1)"
    )
    code = through_processor if facts.has_image_processor else without_processor
    return {"title": "With hf_msn, the average of the replicas:", "code": code}


def codistillation(facts: CheckpointFacts) -> list[str]:
    """Paragraphs on what `codistillation.json` says; none where there is no such file."""
    said = facts.codistillation
    if said is None:
        return []
    parts = [_average(facts)] if facts.replicas else [_one(said)]
    settings = said.get("settings")
    if isinstance(settings, dict) and settings and (facts.run.get("sync") or {}).get("method") != "Codistillation":
        parts[0] += f" Settings: {', '.join(f'{escaped(key)} {escaped(value)}' for key, value in settings.items())}."
    metrics = said.get("metrics")
    if facts.replicas and isinstance(metrics, dict) and metrics:
        step = f" (step {escaped(said['step'])})" if said.get("step") is not None else ""
        parts += [
            f"The run's own evaluation of these very weights, after its last update{step}, as its "
            "`codistillation.json` tells it. It is no result of hf_msn's evaluator, and nothing here checks it:",
            _table(facts.replicas, metrics),
        ]
    return parts


def _one(said: dict[str, Any]) -> str:
    which, count = (escaped(said.get(name, "unknown")) for name in ("published", "replicas"))
    text = f"Codistilled: replica {which} of {count} (counted from 0) is published"
    if said.get("checkpoint"):
        text += f", as it was in {escaped(said['checkpoint'])}"
    if said.get("metric"):
        values = said.get("values")
        listed = ", ".join(_number(value) for value in values) if isinstance(values, list) else ""
        text += f", the best by {escaped(said['metric'])}" + (f" (by replica: {listed})" if listed else "")
        text += ", as the run itself measured it"
    return f"{text}."


def _average(facts: CheckpointFacts) -> str:
    listed = ", ".join(f"`{name}/`" for name in facts.replicas)
    return (
        f"Codistilled: the average of what {len(facts.replicas)} replicas predict is published. The folder itself "
        f"holds the first replica alone; the replicas lie in {listed}. `PredictionAverage` of hf_msn loads them all, "
        "and takes the time and the memory of all."
    )


def _table(replicas: list[str], metrics: dict[str, Any]) -> str:
    titles = ["metric", *(name.replace("_", " ") for name in replicas), "average"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, measured in list(metrics.items())[:_MOST_METRICS]:
        measured = measured if isinstance(measured, dict) else {}
        own = measured.get("replicas")
        own = own if isinstance(own, list) and len(own) == len(replicas) else [None] * len(replicas)
        cells = [escaped(name), *(_number(value) for value in (*own, measured.get("average")))]
        lines.append(f"| {' | '.join(cells)} |")
    if len(metrics) > _MOST_METRICS:
        lines.append(f"\nAnd {len(metrics) - _MOST_METRICS} more in `codistillation.json`.")
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.6g}"
    return "-" if value is None else escaped(value)
