"""One file per family of diffusers pipelines, and the points in the plane, which need no pipeline.

In comes a loaded pipeline; out goes a `DiffusionModel` that calls the pipeline's text encoders, denoiser and decoder.
"""
