"""Run the command line by `python -m trimpoint`."""

import sys

from trimpoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
