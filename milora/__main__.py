"""`python -m milora`: the same as the `milora` command."""

import sys

from milora.cli import main

if __name__ == "__main__":
    sys.exit(main())
