"""``python -m asyncproxy``."""

import sys

from asyncproxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
