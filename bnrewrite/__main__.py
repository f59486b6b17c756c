"""`python -m bnrewrite`: the command."""

import sys

from bnrewrite.cli import main

if __name__ == "__main__":
    sys.exit(main())
