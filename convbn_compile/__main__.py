"""python -m convbn_compile: the command line."""

import sys

from convbn_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
