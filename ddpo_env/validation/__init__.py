"""Checks before anything heavy happens: a caller's values come in, checked values or an error that names them go out.

`options` checks dataclasses of settings against their annotations, `choices` has the names that they choose among, and
`arguments` checks what the environment is given.
"""
