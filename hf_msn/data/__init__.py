"""Images from anywhere, and the views that a network learns from."""

from hf_msn.data.collators import MultiViewCollator
from hf_msn.data.datasets import MultiViewDataset, StreamingMultiViewDataset, as_crops, multi_view_dataset
from hf_msn.data.decoding import BrokenImageError, decode_image
from hf_msn.data.evaluation_processor import evaluation_image_processor
from hf_msn.data.labels import check_class_names, draw_labelled_rows, labelled_rows
from hf_msn.data.samplers import ClassStratifiedSampler
from hf_msn.data.sources import image_file_names, load_images
from hf_msn.data.splits import (
    ListFileReport,
    low_shot_indices,
    match_list_file,
    read_list_file,
    report_list_file,
)
from hf_msn.data.support import SupportBatches, SupportCollator, SupportDataset, support_loader
from hf_msn.data.transforms import MultiViewTransform

__all__ = [
    "BrokenImageError",
    "ClassStratifiedSampler",
    "ListFileReport",
    "MultiViewCollator",
    "MultiViewDataset",
    "MultiViewTransform",
    "StreamingMultiViewDataset",
    "SupportBatches",
    "SupportCollator",
    "SupportDataset",
    "as_crops",
    "check_class_names",
    "decode_image",
    "draw_labelled_rows",
    "evaluation_image_processor",
    "image_file_names",
    "labelled_rows",
    "load_images",
    "low_shot_indices",
    "match_list_file",
    "multi_view_dataset",
    "read_list_file",
    "report_list_file",
    "support_loader",
]
