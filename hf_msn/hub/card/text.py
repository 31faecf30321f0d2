"""The parts of a model card as Markdown: tables, use, licence, citations. Whatever comes from outside is escaped."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from ...evaluation.results import LowShotResults, SplitResult, TaskResult
from ...privacy import public_name
from .measured import FinetuningNumbers

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#|!~$])")
_PAPERS = {
    "msn": """@article{assran2022masked,
  title   = {Masked Siamese Networks for Label-Efficient Learning},
  author  = {Assran, Mahmoud and Caron, Mathilde and Misra, Ishan and Bojanowski, Piotr and Bordes, Florian and
             Vincent, Pascal and Joulin, Armand and Rabbat, Michael and Ballas, Nicolas},
  journal = {arXiv preprint arXiv:2204.07141},
  year    = {2022}
}""",
    "paws": """@article{assran2021semi,
  title   = {Semi-Supervised Learning of Visual Features by Non-Parametrically Predicting View Assignments with
             Support Samples},
  author  = {Assran, Mahmoud and Caron, Mathilde and Misra, Ishan and Bojanowski, Piotr and Joulin, Armand and
             Ballas, Nicolas and Rabbat, Michael},
  journal = {arXiv preprint arXiv:2104.13963},
  year    = {2021}
}""",
    "suncet": """@article{assran2020supervision,
  title   = {Supervision Accelerates Pre-training in Contrastive Semi-Supervised Learning of Visual Representations},
  author  = {Assran, Mahmoud and Ballas, Nicolas and Castrejon, Lluis and Rabbat, Michael},
  journal = {arXiv preprint arXiv:2006.10803},
  year    = {2020}
}""",
    "local_sgd": """@article{stich2018local,
  title   = {Local SGD Converges Fast and Communicates Little},
  author  = {Stich, Sebastian U.},
  journal = {arXiv preprint arXiv:1805.09767},
  year    = {2018}
}""",
    "slowmo": """@article{wang2019slowmo,
  title   = {SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum},
  author  = {Wang, Jianyu and Tantia, Vinayak and Ballas, Nicolas and Rabbat, Michael},
  journal = {arXiv preprint arXiv:1910.00643},
  year    = {2019}
}""",
    "gossip": """@article{assran2018stochastic,
  title   = {Stochastic Gradient Push for Distributed Deep Learning},
  author  = {Assran, Mahmoud and Loizou, Nicolas and Ballas, Nicolas and Rabbat, Michael},
  journal = {arXiv preprint arXiv:1811.10792},
  year    = {2018}
}""",
    "d_psgd": """@article{lian2017can,
  title   = {Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized Parallel
             Stochastic Gradient Descent},
  author  = {Lian, Xiangru and Zhang, Ce and Zhang, Huan and Hsieh, Cho-Jui and Zhang, Wei and Liu, Ji},
  journal = {arXiv preprint arXiv:1705.09056},
  year    = {2017}
}""",
    "ad_psgd": """@article{lian2017asynchronous,
  title   = {Asynchronous Decentralized Parallel Stochastic Gradient Descent},
  author  = {Lian, Xiangru and Zhang, Wei and Zhang, Ce and Liu, Ji},
  journal = {arXiv preprint arXiv:1710.06952},
  year    = {2017}
}""",
    "async_push": """@article{assran2018asynchronous,
  title   = {Asynchronous Gradient-Push},
  author  = {Assran, Mahmoud and Rabbat, Michael},
  journal = {arXiv preprint arXiv:1803.08950},
  year    = {2018}
}""",
    "codistillation": """@article{sodhani2020closer,
  title   = {A Closer Look at Codistillation for Distributed Training},
  author  = {Sodhani, Shagun and Delalleau, Olivier and Assran, Mahmoud and Sinha, Koustuv and Ballas, Nicolas and
             Rabbat, Michael},
  journal = {arXiv preprint arXiv:2010.02838},
  year    = {2020}
}""",
}


def escaped(text: Any) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no new line or column."""
    line = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(text))).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(r"\\\1", line)
    return re.sub(r"(https?|www)([:.])", r"\1&#8203;\2", line)  # no link of itself


def data_name(data: dict[str, Any]) -> str:
    """Name and split of a data set, escaped."""
    name, split = data.get("name"), data.get("split")
    said = escaped(public_name(str(name))) if name else "a data set without a name"
    return f"{said}, split {escaped(split)}" if split else said


def task_title(task: TaskResult) -> str:
    """`5_per_class` as a reader says it."""
    found = re.fullmatch(r"(\d+)_per_class", task.name)
    if found:
        return f"{found[1]} image{'' if found[1] == '1' else 's'} a class"
    found = re.fullmatch(r"([\d.]+)_percent", task.name)
    return f"{found[1]} % of the labels" if found else escaped(public_name(task.name))


def low_shot_table(results: LowShotResults) -> str:
    """Accuracy of each task in per cent, to one digit, as `LowShotResults.table` prints it."""
    lines = [
        "| labelled images | top-1 [%], mean ± std | 95 % interval | top-5 [%] | splits | labelled in all |",
        "|---|---|---|---|---|---|",
    ]
    for task in results.tasks:
        summary, several = task.summary, len(task.splits) > 1
        half = summary["top1_ci95"]
        low, high = max(0.0, summary["top1"] - half), min(100.0, summary["top1"] + half)
        cells = (
            task_title(task),
            f"{summary['top1']:.1f}" + (f" ± {summary['top1_std']:.1f}" if several else ""),
            f"{low:.1f} to {high:.1f}" if several else "-",
            f"{summary['top5']:.1f}" if "top5" in summary else "-",
            str(len(task.splits)),
            _range([split.num_images for split in task.splits]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def low_shot_definition(results: LowShotResults) -> str:
    """What the numbers of a table are: data, splits, probe, features."""
    train, test = results.data["train"], results.data["test"]
    lines = [
        f"- **Tested on** {data_name(test)}: {test['num_images']} images of {results.tasks[0].num_classes} classes"
        f"{_skipped(test)}, fingerprint `{_code(test.get('fingerprint'))}`, rows and labels "
        f"`{_code(test.get('rows_and_labels_sha256'))}`.",
        f"- **Labelled images** from {data_name(train)}, fingerprint `{_code(train.get('fingerprint'))}`"
        f"{_skipped(train)}.",
    ]
    lines += [f"- **{task_title(task)}**: {_splits(task)}." for task in results.tasks]
    probe = dict(results.probe)
    name = escaped(str(probe.pop("probe", "unknown")).replace("_", " "))
    if "l2" in probe:
        used = sorted({split.fit["l2"] for task in results.tasks for split in task.splits if "l2" in split.fit})
        probe["l2"] = ", ".join(str(value) for value in used) or probe["l2"]
    lines.append(
        f"- **Probe**: {name} ({', '.join(f'{escaped(key)} {escaped(value)}' for key, value in probe.items())}) on "
        f"{_features(results)}."
    )
    several = any(len(task.splits) > 1 for task in results.tasks)
    if several:
        lines.append(
            "- Mean and standard deviation (n - 1) are over the splits; the interval is that of the mean by Student's "
            "t, cut to [0, 100]. It is of the draw of labelled images, not of the training, which was run once."
        )
    return "\n".join(lines)


def finetuning_table(numbers: FinetuningNumbers) -> str:
    """Accuracy on the test images, with a 95 % interval by Wilson, and what chose the epoch."""
    said, count = numbers.said, numbers.said["num_test_images"]
    lines = ["| measured on | images | what classifies | top-1 [%] | 95 % interval |", "|---|---|---|---|---|"]
    for space, accuracy in numbers.test_accuracy.items():
        low, high = wilson_interval(accuracy, count)
        where = data_name(said.get("test_data") or {})
        lines.append(f"| {where} | {count} | {_space(space)} | {accuracy:.1f} | {low:.1f} to {high:.1f} |")
    notes = ["", "The interval is Wilson's for that many test images; the training was run once."]
    if said["validation_accuracy"] is not None:
        notes += [
            "",
            f"The epoch ({said['best_epoch']}) was chosen on {said['num_held_out_images']} held-out labelled images, "
            f"of which {said['validation_accuracy']:.1f} % were right. That is no measure of new images.",
        ]
    return "\n".join([*(lines if numbers.test_accuracy else []), *(notes if numbers.test_accuracy else notes[3:])])


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share in per cent, seen in `count` images."""
    share, z = accuracy / 100, 1.959963984540054
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def fenced(values: dict[str, Any]) -> str:
    """Settings as a block of YAML that nothing in them can end."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}yaml\n{text}\n{fence}"


def citations(names: Sequence[str]) -> str:
    """BibTeX of the papers of these methods."""
    return "```bibtex\n" + "\n\n".join(_PAPERS[name] for name in names if name in _PAPERS) + "\n```"


def duration(seconds: float) -> str:
    """12.3 s, 4.5 min or 6.7 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _splits(task: TaskResult) -> str:
    seeds = [split.seed for split in task.splits if split.seed is not None]
    lists = [public_name(split.list_file) for split in task.splits if split.list_file is not None]
    if seeds:
        said = f"drawn at random, stratified, with seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    elif lists:
        # files of one name in several folders are the splits of a task
        said = f"of the list file{'s' if len(lists) > 1 else ''} {', '.join(escaped(name) for name in lists)}"
    else:
        said = "given row by row"
    count = _per_class(task.splits)
    return f"{said}; {count} labelled image{'' if count == '1' else 's'} of each class"


def _per_class(splits: Sequence[SplitResult]) -> str:
    fewest, most = min(split.fewest_per_class for split in splits), max(split.most_per_class for split in splits)
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def _range(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _features(results: LowShotResults) -> str:
    layers, features = results.settings.get("num_last_layers", 1), results.settings.get("features")
    if features == "projection":
        return "the projections of the model's head"
    return "the features of the encoder" + (f", of its last {escaped(layers)} blocks" if layers != 1 else "")


def _skipped(data: dict[str, Any]) -> str:
    count = data.get("num_skipped") or 0
    return f" ({escaped(count)} unreadable ones left out)" if count else ""


def _space(space: str) -> str:
    names = {"top1": "the classifier", "projection": "nearest neighbours of the projections"}
    return names.get(space, f"nearest neighbours of the features ({escaped(space)})")


def _code(text: Any) -> str:
    """What stands in backticks."""
    return re.sub(r"[^\w.:+-]", "", str(text)) if text else "unknown"
