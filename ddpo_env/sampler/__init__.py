"""One denoising step as a Gaussian: what a stochastic sampler does between two latents, and how likely that was.

In come a diffusers scheduler, latents and the denoiser's output; out go next latents, log-probabilities and KL
divergences. Nothing here knows environments, models or prompts.
"""
