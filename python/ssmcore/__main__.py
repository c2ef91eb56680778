"""`python -m ssmcore`: the command line."""

import sys

from ssmcore.cli import main

sys.exit(main())
