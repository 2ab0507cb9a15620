"""A denoiser as a Stable-Baselines3 policy: observations come in, a Gaussian over the next latent goes out.

`diffusion_policy` is the policy. The other files are what it is made of: its options, classifier-free guidance, the
action distribution, LoRA, a critic, and what a policy can do for an algorithm (`abilities`).
"""
