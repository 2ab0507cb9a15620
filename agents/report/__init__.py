"""The report of a run: one HTML file that shows what training did, from what the run folder holds.

`evaluation_files` and `sample_files` are what a run stores for it; `run_data` reads a run folder; `verdicts` says in
words what the monitors show; `charts` and `pictures` prepare what is drawn; `page` fills the template in `data/`.
"""
