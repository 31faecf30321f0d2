"""Images from anywhere, and the views that a network learns from."""

from hf_msn.data.collators import MultiViewCollator
from hf_msn.data.datasets import MultiViewDataset, StreamingMultiViewDataset, multi_view_dataset
from hf_msn.data.decoding import BrokenImageError, decode_image
from hf_msn.data.sources import image_file_names, load_images
from hf_msn.data.splits import (
    ListFileReport,
    low_shot_indices,
    match_list_file,
    read_list_file,
    report_list_file,
)
from hf_msn.data.transforms import MultiViewTransform, evaluation_image_processor

__all__ = [
    "BrokenImageError",
    "ListFileReport",
    "MultiViewCollator",
    "MultiViewDataset",
    "MultiViewTransform",
    "StreamingMultiViewDataset",
    "decode_image",
    "evaluation_image_processor",
    "image_file_names",
    "load_images",
    "low_shot_indices",
    "match_list_file",
    "multi_view_dataset",
    "read_list_file",
    "report_list_file",
]
