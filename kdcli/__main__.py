"""`python -m kdcli` is `kdcli`."""

import sys

from kdcli.cli import main

if __name__ == "__main__":
    sys.exit(main())
