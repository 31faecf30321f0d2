"""Publish a checkpoint on the Hugging Face Hub. The same as `hf-msn publish`.

python scripts/publish.py --checkpoint runs/mine --repo_id user/name --results low_shot.json --dry_run true
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("publish")
