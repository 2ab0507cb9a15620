"""Export the LoRA of a run as a folder for the Hugging Face Hub: the command `ddpo-export` from a clone."""

import sys

from agents.commands.export.command import main

if __name__ == "__main__":
    sys.exit(main())
