"""python -m modelyard.cli, the same as `modelyard`."""

import sys

from modelyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
