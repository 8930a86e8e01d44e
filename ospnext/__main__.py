"""`python -m ospnext`: the command `ospnext`, in the form that torchrun starts. Nothing else lives here."""

import sys

from ospnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
