"""Rewards from a judge: a vision-language model, in this process or on a server, that answers questions about images.

In come decoded images, their prompts and metadata; out come one score per image and the judge's answers.
"""
