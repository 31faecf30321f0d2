"""Write the model card of a checkpoint from measured results. The same as `hf-msn card`.

python scripts/make_model_card.py --checkpoint runs/mine --results low_shot.json --plot --license apache-2.0
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("card")
