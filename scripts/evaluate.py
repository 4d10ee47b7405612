"""`clipdistill evaluate` as a script, for launchers: `accelerate launch` and `torchrun`."""

import sys

from clipdistill.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
