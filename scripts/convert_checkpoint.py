"""Convert the papers' own checkpoints of MSN and PAWS, and back. The same as `hf-msn convert`.

python scripts/convert_checkpoint.py --input vits16_800ep.pth.tar --output runs/vits16
python scripts/convert_checkpoint.py --to_original --input runs/vits16 --output vits16.pth.tar
"""

from hf_msn.cli.main import run

if __name__ == "__main__":
    run("convert")
