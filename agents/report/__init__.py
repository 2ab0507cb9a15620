"""The report of a run: one HTML file that shows what training did, from what the run folder holds.

A run stores `evaluation_files` and `sample_files` for it. `run_data` reads a run folder, `verdicts` says in words what
the monitors show, `charts` and `pictures` prepare what is drawn, and `page` fills the template in `data/`. `command` is
`ddpo-report`, and `server` sends the page while a run goes on.
"""
