"""LoRA files: which ones are read and how, and what is written.

In comes a file that somebody else may have written; out go adapters by component of the pipeline.
"""
