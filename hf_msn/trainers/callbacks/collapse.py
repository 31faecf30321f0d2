"""A warning, or a stop, when training has found a trivial solution."""

import math

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput, logging

from ...distributed.collectives import all_reduce_sum, is_distributed, rank, world_size
from .local_update import find_per_rank_callback

logger = logging.get_logger(__name__)

UPDATES_PER_CHECK, CHECKS = 20, 3
MIN_ROWS, MAX_ROWS = 8, 256  # of a micro-batch: fewer are not judged, more do not enter its rank
# Limits: below all values of the healthy runs in tests/trainers/callbacks/test_collapse.py.
MIN_STD, MIN_RANK = 0.01, 1.5
MIN_SHARE_OF_INFORMATION = 0.03

_SLOWER = "Lower `learning_rate`, lengthen the warm-up"
SYMPTOMS = {
    "feature_std": f"the encoder gives the same features for all images. {_SLOWER}, or lower `weight_decay`.",
    "projection_std": f"the heads give the same projection for all images. {_SLOWER}, or lower `weight_decay`.",
    "feature_rank": f"the features of all images lie on one line. {_SLOWER}, or enlarge the batch.",
    "targets_in_use": "nearly all images have the same target. Raise `me_max_weight`, enlarge the batch, or use "
    "Sinkhorn (`use_sinkhorn`) if the method has it.",
    "target_information": "all images have the same flat target. Weaken the views (`color_jitter`, `grayscale`, "
    "`blur_probability`, a larger `global_scale`), lower `sharpen_temperature`, or enlarge the batch.",
}


class CollapseCallback(TrainerCallback):
    """Watch whether features and targets still depend on the image, and warn or stop if not (`on_collapse`).

    Measured on each micro-batch of a rank:

    - `feature_std`, `projection_std`: standard deviation per dimension of the l2-normalised outputs of encoder and
      heads, times sqrt(D): about 1 if they point everywhere, 0 if all are equal (arXiv 2011.10566, section 4.1);
    - `feature_rank`: effective rank, the exponential of the entropy of the normalised singular values, of centred
      features (arXiv 2210.02885, equation 2), once in 20 updates;
    - `target_information`: H(mean_i p_i) - mean_i H(p_i) of the targets p, in nats: what the assignment to prototypes
      or classes says about an image. It is 0 for the uniform assignment, and for one prototype or class for all;
    - `targets_in_use`: exp(H(mean_i p_i)), the effective number of prototypes or classes. Not logged.

    The means of 20 updates are judged, in micro-batches of 8 rows and more. A collapse is three of them in a row below
    a limit. Rank 0 warns once, with the number of ranks that have collapsed: of several ranks at the next log. With
    `on_collapse="stop"` all ranks meet once in 20 updates, and end the run together.

    Args:
        trainer (`Trainer`): It calls [`observe`] with each output of its model in training.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._limits: dict[str, float] = {}
        self._features: torch.Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self.feature_rank: float | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._count = self._num_bad = 0
        self._symptom: tuple[str, float, float] | None = None  # name, value, limit
        self._reported = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()  # of an earlier training, or of a batch size that did not fit into memory

    @torch.no_grad()
    def observe(self, outputs: ModelOutput) -> dict[str, torch.Tensor]:
        """Add a micro-batch by its `features`, `projections` and `target_probabilities`, and return what to log."""
        logged = {"feature_std": scaled_std(outputs.features), "projection_std": scaled_std(outputs.projections)}
        values, limits = logged, {"feature_std": MIN_STD, "projection_std": MIN_STD}
        targets = outputs.get("target_probabilities")
        if targets is not None and min(targets.shape) > 1:
            entropy_of_mean = torch.special.entr(targets.mean(dim=0)).sum()
            logged["target_information"] = entropy_of_mean - torch.special.entr(targets).sum(dim=-1).mean()
            values = {**logged, "targets_in_use": entropy_of_mean.exp()}
            most = min(targets.shape)
            limits["target_information"] = MIN_SHARE_OF_INFORMATION * math.log(most)
            # Where there are few classes, most images may be of one.
            limits["targets_in_use"] = min(max(1.5, 0.05 * most), 1 + 0.1 * (most - 1))
        if len(outputs.features) >= MIN_ROWS:
            self._sums = {name: self._sums.get(name, 0.0) + value.float() for name, value in values.items()}
            self._limits, self._features = limits, outputs.features[:MAX_ROWS]
            self._count += 1
        return logged

    def on_step_end(self, args, state, control, **kwargs):
        if args.on_collapse == "ignore" or state.global_step % UPDATES_PER_CHECK:
            return
        if self._count:
            self._judge()
        if args.on_collapse != "stop":
            if not is_distributed():
                self.report(args, state.global_step)
            return
        if (callback := find_per_rank_callback(self.trainer)) is not None:
            callback.wait_for_all()
        if self.report(args, state.global_step):
            if state.is_world_process_zero:
                logger.warning(f"The run ends at step {state.global_step} with a checkpoint: `on_collapse` is stop.")
            control.should_save = control.should_training_stop = True

    def report(self, args: TrainingArguments, step: int) -> int:
        """Return the number of ranks that have collapsed; rank 0 warns once. All ranks call it, as at a log."""
        if args.on_collapse == "ignore":
            return 0
        own = torch.zeros(3, len(SYMPTOMS), device=args.device)
        if self._symptom is not None:
            name, *numbers = self._symptom
            own[:, [*SYMPTOMS].index(name)] = torch.tensor([1.0, *numbers])
        counts, values, limits = all_reduce_sum(own).tolist()
        num_ranks = int(sum(counts))
        if num_ranks and not self._reported:
            self._reported = True
            place = counts.index(max(counts))
            name, value, limit = [*SYMPTOMS][place], values[place] / counts[place], limits[place] / counts[place]
            where = f" on {num_ranks} of {world_size()} ranks" if is_distributed() else ""
            if rank() == 0:
                logger.warning(
                    f"At step {step}: the run has collapsed{where}: {SYMPTOMS[name]} `{name}` was {value:.2g}, in "
                    f"{CHECKS * UPDATES_PER_CHECK} updates below {limit:.2g}."
                )
        return num_ranks

    def _judge(self) -> None:
        """Compare the means since the last time with the limits."""
        sums = torch.stack([*self._sums.values(), self._count * effective_rank(self._features)])
        means = dict(zip([*self._sums, "feature_rank"], (sums / self._count).tolist()))
        limits = {**self._limits, "feature_rank": MIN_RANK}
        self.feature_rank, self._sums, self._count = means["feature_rank"], {}, 0
        found = [name for name in SYMPTOMS if name in means and means[name] < limits[name]]
        found = found if math.isfinite(means["feature_std"]) else []
        self._num_bad = self._num_bad + 1 if found else 0
        has_collapsed = self._num_bad >= CHECKS
        self._symptom = (found[0], means[found[0]], limits[found[0]]) if has_collapsed else None


def scaled_std(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean standard deviation per dimension of l2-normalised rows (N, D), times sqrt(D)."""
    rows = F.normalize(rows.float(), dim=-1)
    return rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(rows: torch.Tensor) -> torch.Tensor:
    """Return the exponential of the entropy of the normalised singular values of centred rows (N, D)."""
    centred = rows.float() - rows.float().mean(dim=0)
    if not centred.isfinite().all():  # svdvals would raise, before NonFiniteLossCallback names the step
        return centred.new_tensor(math.nan)
    singular_values = torch.linalg.svdvals(centred)
    shares = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(shares).sum().exp()
