"""Commands that stand above training: they examine runs, start several, or pass one on.

`doctor` examines a run before it is paid for, and `export` makes a folder for the Hugging Face Hub of a finished one.
`sample` and `evaluate` are the command lines of `agents.evaluation`, which may name a run. A command here may import
every other room; none of them imports it.
"""
