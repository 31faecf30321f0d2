"""Low-shot evaluation of any vision model. The same as `hf-msn evaluate`.

python scripts/evaluate_low_shot.py --model runs/mine --dataset FOLDER --output low_shot.json
"""

import sys

from hf_msn.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
