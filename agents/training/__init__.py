"""A training run: a configuration comes in; a folder with a trained policy, images, metrics and a summary goes out.

`command` is the command line, `preparation` checks and loads a run, and `run` is the run itself.
"""
