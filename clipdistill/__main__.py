"""``python -m clipdistill``, also under ``torchrun -m`` and ``accelerate launch -m``."""

import sys

from clipdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
