"""`python -m gdino_hf` is the `gdino` command."""

import sys

from gdino_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
