"""Race settings against each other: the command `ddpo-race` from a clone. `--help` lists every setting."""

import sys

from agents.commands.race.command import main

if __name__ == "__main__":
    sys.exit(main())
