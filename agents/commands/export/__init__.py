"""The command `ddpo-export`: the LoRA of a finished run as a folder for the Hugging Face Hub.

`finished_run` reads the run, `base_model` watches its pipeline, `kohya` writes the LoRA in the form of other programs,
`measured` reads an evaluation, `example` writes the code that loads the LoRA, and `model_card` says it all.
"""
