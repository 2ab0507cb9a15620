"""The words that the bundled model knows: plain data, shared by its pretraining, its evaluation and the prompt sets.

Reinforcement learning trains on `SIMPLE_ANIMALS` (and `ACTIVITIES`, `COUNTS` of them) only. `HELD_OUT_ANIMALS` and
`EVERYDAY_OBJECTS` are in the pretraining but never in an RL prompt set, so they show how far a learned behaviour
carries over to prompts that it was not rewarded on (DDPO, arXiv 2305.13301, section 6.3).
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

# Other animals that the bundled model draws: generalisation to unseen animals. Never trained on with RL.
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

# Things that are no animals: generalisation to unseen objects. Never trained on with RL.
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

# What an animal can be doing, as in "a fox riding a bike": the paper's three, in its wording.
ACTIVITIES: tuple[str, ...] = ("washing the dishes", "riding a bike", "playing chess")

# How many of an animal, as in "two dogs".
COUNTS: tuple[str, ...] = ("two", "three", "four")
