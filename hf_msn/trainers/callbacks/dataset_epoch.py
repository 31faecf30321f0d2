"""The number of the epoch, for a data set that draws other views in each."""

from transformers import TrainerCallback


class DatasetEpochCallback(TrainerCallback):
    """Call `set_epoch` of the data set before each epoch, so that each epoch sees other views.

    accelerate forwards the epoch to the sampler *or* to the data set, and on several ranks never to the data set.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))
