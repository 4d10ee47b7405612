"""`clipdistill estimate` as a file, for launchers: `accelerate launch` and `torchrun`."""

import sys

from clipdistill.cli import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
