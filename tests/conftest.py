"""What holds for all tests: no network, one thread, no progress bars; and a tiny model with a batch."""

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_finish():
    # Not at the top: the process that starts the workers of pytest-xdist would wait for these imports, too.
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def garbage_is_collected_quickly():
    """Each Trainer collects garbage: what is alive by now, such as modules, need not be searched each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left_by_the_test_before():
    """Reset the log that a command has set up, and accelerate's list of loaders that an error has ended."""
    yield
    from accelerate.state import GradientState

    GradientState().dataloader_references = [None]
    logger = logging.getLogger("hf_msn")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def msn_model():
    """A new tiny `MSNForPreTraining` in training mode, the same weights in every test."""
    from tiny import tiny_model

    return tiny_model()


@pytest.fixture
def msn_batch():
    """The views of 4 images, for `msn_model(**msn_batch)`."""
    from tiny import tiny_batch

    return tiny_batch()
