"""The command `ddpo-doctor`: a run is examined on its own machine, in minutes, before anything is trained.

`command` reads the settings as `ddpo-train` does; `examination` builds a small copy of the run; each check of the other
files returns one `Finding`; `report` prints and writes them.
"""
