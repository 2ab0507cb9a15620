"""108 renderings of emoji that nobody was trained on.

Each of the 45 animals, 15 with each activity, six counts, five animals reading a book, and four held-out animals and
three objects with an activity.

`python scripts/bundled_models/evaluate_judges.py --test-sheet tests/data/held_out_renderings.png` writes them.
"""

import numpy as np
from PIL import Image

from helpers.paths import ROOT

SHEET = ROOT / "tests" / "data" / "held_out_renderings.png"
SIDE = 64


def load_renderings():
    """Images, (108, 64, 64, 3) uint8, and their captions."""
    with Image.open(SHEET) as sheet:
        pixels, captions = np.asarray(sheet.convert("RGB")), sheet.text["captions"].split("\n")
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    images = pixels.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    assert len(images) == len(captions)
    return np.ascontiguousarray(images), captions
