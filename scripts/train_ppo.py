"""Fine-tune a diffusion model: the command `ddpo-train` from a clone. `--help` lists every setting."""

import sys

from agents.training.command import main

if __name__ == "__main__":
    sys.exit(main())
