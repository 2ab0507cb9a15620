"""Examine a run before it is paid for: the command `ddpo-doctor` from a clone. `--help` lists every setting."""

import sys

from agents.commands.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
