"""Pretrain a vision transformer with Masked Siamese Networks.

accelerate launch scripts/pretrain.py --config scripts/recipes/msn_vits16_imagenet.yaml --output_dir runs/vits16
"""

from hf_msn import MSNTrainer, parse_recipe


def main():
    recipe = parse_recipe()
    trainer = MSNTrainer(
        recipe.build_model(),
        recipe.training,
        train_dataset=recipe.build_train_dataset(),
        processing_class=recipe.build_image_processor(),
    )
    recipe.add_low_shot_callback(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
