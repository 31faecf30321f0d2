"""Fine-tune on labelled images alone. The same as `hf-msn finetune`.

accelerate launch scripts/finetune.py --config finetune_digits --output_dir runs/tuned
accelerate launch scripts/finetune.py --model runs/paws --dataset FOLDER --test_split test --output_dir runs/tuned
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("finetune")
