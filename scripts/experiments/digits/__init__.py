"""Pictures with digits, and networks that learn from them, for `scripts/experiments/typographic_attack.py`."""

import sys
from pathlib import Path

# The renderings and the training loops are those of the bundled models.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bundled_models"))
