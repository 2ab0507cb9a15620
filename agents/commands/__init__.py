"""Commands that stand above training: they examine runs, or start several.

`doctor` examines a run before it is paid for. A command here may import every other room; none of them imports it.
"""
