"""`python -m funcmodel` is the command `funcmodel`."""

import sys

from funcmodel.cli import main

sys.exit(main())
