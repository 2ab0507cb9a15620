"""Policy gradients: algorithms that train the steps of the sampler by their log-probabilities.

Only a step with noise has a log-probability. `ppo` and `reinforce` are the two estimators of DDPO; `grpo` is `ppo` with
advantages among the samples of a prompt. `trust_region` has what bounds the updates of both.
"""
