"""The command `ddpo-race`: several settings of a run compete under one budget, and the worst leave early.

`contenders` reads the settings that compete; `halving` says who trains how far and who goes on; `costs` turns a budget
into iterations; `race` trains the runs, one after another; `state` keeps their results in a file; `table` and `figure`
show them; `command` is the command line.
"""
