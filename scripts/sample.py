"""Generate images with a base model or a trained LoRA: the command `ddpo-sample` from a clone."""

import sys

from agents.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
