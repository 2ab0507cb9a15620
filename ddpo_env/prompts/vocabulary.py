"""The words that the bundled model knows: its pretraining, its evaluation and the prompt sets use this data.

Reinforcement learning trains only on `SIMPLE_ANIMALS`, with `ACTIVITIES` and `COUNTS`. `HELD_OUT_ANIMALS`,
`EVERYDAY_OBJECTS` and `HELD_OUT_ACTIVITIES` are in the pretraining but never in a prompt set of the training. They show
how well a learned behaviour generalizes to other prompts (DDPO, arXiv 2305.13301, section 6.3).
"""

from importlib.resources import files


def read_words(name: str) -> tuple[str, ...]:
    """Return the lines of a list in `ddpo_env/data/words`, without its comments."""
    lines = files("ddpo_env").joinpath("data", "words", f"{name}.txt").read_text("utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


SIMPLE_ANIMALS = read_words("simple_animals")
HELD_OUT_ANIMALS = read_words("held_out_animals")
EVERYDAY_OBJECTS = read_words("everyday_objects")

# Activities of an animal, as in "a fox riding a bike": the paper's three, in its wording.
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")

# An activity that the bundled model knows and that reinforcement learning never uses.
HELD_OUT_ACTIVITIES = ("reading a book",)

# The animals that the pretraining always shows with the activity of the caption, of every kind of animal. With the
# other 30 it often leaves the activity out, and held-out animals and objects have none.
ACTIVE_ANIMALS = (
    *("cat", "horse", "cow", "monkey", "lion", "fox", "mouse"),
    *("bird", "duck", "frog", "turtle", "ant", "bee", "fish", "dolphin"),
)

# Numbers of animals, as in "two dogs".
COUNTS = ("two", "three", "four")
