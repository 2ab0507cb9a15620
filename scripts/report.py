"""Show what training did, in one HTML file: the command `ddpo-report` from a clone."""

import sys

from agents.report.command import main

if __name__ == "__main__":
    sys.exit(main())
