"""Low-shot evaluation of any vision model. The same as `hf-msn evaluate`.

python scripts/evaluate_low_shot.py --model runs/mine --dataset FOLDER --output low_shot.json
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("evaluate")
