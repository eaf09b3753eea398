"""`python -m router`: the same as the console command `proto-route`."""

import sys

from router.cli import main

sys.exit(main())
