"""Fine-tune on labelled images alone: a linear classifier on an encoder, or encoder and projection head by SuNCEt.

accelerate launch scripts/finetune.py --config scripts/recipes/finetune_digits.yaml --output_dir runs/tuned
accelerate launch scripts/finetune.py --model runs/paws --dataset FOLDER --test_split test --output_dir runs/tuned
"""

from accelerate import PartialState

from hf_msn import parse_finetuning_recipe


def main():
    recipe = parse_finetuning_recipe()
    result = recipe.finetune()
    result.save(recipe.output_dir)
    if recipe.start.test_split is not None:
        recipe.test(result)
        result.save(recipe.output_dir)
    PartialState().print(result.describe())
    recipe.push(result)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
