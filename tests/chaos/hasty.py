"""The command line of an etl that does every second what it does every ten minutes: retention, compression, widths.

python -m tests.chaos.hasty etl
"""

from __future__ import annotations

import sys

from services import cli
from services.etl import compression, worker

EVERY_S = 1.0


def main() -> int:
    """Run the command line with short periods."""
    worker.DUTIES_INTERVAL_S = compression.RUN_INTERVAL_S = EVERY_S
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
