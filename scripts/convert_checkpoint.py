"""Convert the papers' own checkpoints of MSN and PAWS, and back. The same as `hf-msn convert`.

python scripts/convert_checkpoint.py --input vits16_800ep.pth.tar --output runs/vits16
python scripts/convert_checkpoint.py --to_original --input runs/vits16 --output vits16.pth.tar
"""

import sys

from hf_msn.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
