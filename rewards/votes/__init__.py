"""People as the reward: a page on this machine asks which of two images is better, and the votes become scores.

In come the images of a batch and their prompts; out comes one score per image. `reward` has the whole of it.
"""
