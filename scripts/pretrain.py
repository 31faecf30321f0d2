"""Pretrain an image encoder: MSN without labels, PAWS and SimCLR + SuNCEt with a few. The same as `hf-msn pretrain`.

accelerate launch scripts/pretrain.py --config msn_vits16_imagenet --output_dir runs/vits16
accelerate launch scripts/pretrain.py --method paws --dataset FOLDER --labelled_images_per_class 5 --output_dir out
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("pretrain")
