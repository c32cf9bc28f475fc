"""``python -m asyncproxy``."""

import sys

from asyncproxy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
