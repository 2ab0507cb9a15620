"""The command `ddpo-export`: the LoRA of a finished run as a folder for the Hugging Face Hub.

`base_model` watches the run's pipeline, `kohya` writes the LoRA in the form of other programs,
`measured` reads an evaluation, `example` writes the code that loads the LoRA, and `model_card` says it all.
"""
