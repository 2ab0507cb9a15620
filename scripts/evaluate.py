"""Score a base model and a trained LoRA on the same prompts and seeds: the command `ddpo-evaluate` from a clone."""

import sys

from agents.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
