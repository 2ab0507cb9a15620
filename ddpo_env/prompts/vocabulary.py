"""The words that the bundled model knows: its pretraining, its evaluation and the prompt sets use this data.

Reinforcement learning trains only on `SIMPLE_ANIMALS`, with `ACTIVITIES` and `COUNTS`. `HELD_OUT_ANIMALS` and
`EVERYDAY_OBJECTS` are in the pretraining but never in a prompt set of the training. They show how well a learned
behaviour generalizes to other prompts (DDPO, arXiv 2305.13301, section 6.3).
"""

# The 45 common animals of the DDPO paper, in its order.
SIMPLE_ANIMALS: tuple[str, ...] = (
    "cat",
    "dog",
    "horse",
    "monkey",
    "rabbit",
    "zebra",
    "spider",
    "bird",
    "sheep",
    "deer",
    "cow",
    "goat",
    "lion",
    "tiger",
    "bear",
    "raccoon",
    "fox",
    "wolf",
    "lizard",
    "beetle",
    "ant",
    "butterfly",
    "fish",
    "shark",
    "whale",
    "dolphin",
    "squirrel",
    "mouse",
    "rat",
    "snake",
    "turtle",
    "frog",
    "chicken",
    "duck",
    "goose",
    "bee",
    "pig",
    "turkey",
    "fly",
    "llama",
    "camel",
    "bat",
    "gorilla",
    "hedgehog",
    "kangaroo",
)

# Other animals of the bundled model, for generalization to unseen animals. Reinforcement learning never uses them.
HELD_OUT_ANIMALS: tuple[str, ...] = (
    "penguin",
    "owl",
    "elephant",
    "panda",
    "giraffe",
    "octopus",
    "koala",
    "crocodile",
    "peacock",
    "flamingo",
    "parrot",
    "swan",
    "crab",
    "lobster",
    "snail",
    "scorpion",
    "rhinoceros",
    "ladybug",
    "sloth",
    "hippopotamus",
)

# Objects, for generalization beyond animals. Reinforcement learning never uses them.
EVERYDAY_OBJECTS: tuple[str, ...] = (
    "car",
    "umbrella",
    "guitar",
    "apple",
    "banana",
    "balloon",
    "house",
    "tree",
    "key",
    "clock",
    "book",
    "hat",
    "cactus",
    "rocket",
    "boat",
    "cup",
    "camera",
    "teapot",
    "trumpet",
    "drum",
)

# Activities of an animal, as in "a fox riding a bike": the paper's three, in its wording.
ACTIVITIES: tuple[str, ...] = ("washing the dishes", "riding a bike", "playing chess")

# Numbers of animals, as in "two dogs".
COUNTS: tuple[str, ...] = ("two", "three", "four")
