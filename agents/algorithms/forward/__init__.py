"""Algorithms of the forward process: they noise finished samples again, and train the denoiser's prediction of them.

They need no log-probabilities, so any sampler may have made the samples. Only a denoiser has a forward process.
`forward_process` is what they share; `nft`, `awm` and `dpo` add their losses.
"""
