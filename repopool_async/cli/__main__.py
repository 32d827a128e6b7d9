"""Lets `python -m repopool_async.cli` stand in for the command where no script is installed."""

import sys

from repopool_async.cli import main

sys.exit(main())
