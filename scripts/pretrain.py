"""Pretrain an image encoder: MSN without labels, PAWS and SimCLR + SuNCEt with a few.

accelerate launch scripts/pretrain.py --config scripts/recipes/msn_vits16_imagenet.yaml --output_dir runs/vits16
accelerate launch scripts/pretrain.py --method paws --dataset FOLDER --labelled_images_per_class 5 --output_dir
runs/paws
"""

import gc

from hf_msn import parse_recipe


def main():
    trainer = parse_recipe().build_trainer()
    trainer.train()
    trainer.save_state()
    trainer.save_model()  # late, as with push_to_hub it can fail
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    # The threads of a process group end with the last reference to it; one that outlives the interpreter aborts.
    gc.collect()
