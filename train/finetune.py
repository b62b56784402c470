"""`advcl-hub finetune` as a script, for launchers that want a file:

accelerate launch train/finetune.py MODEL --data cifar10 --root DATA --protocol aff
"""

import sys

from advcl_hub.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
