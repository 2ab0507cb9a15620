"""What learns from a rollout: a rollout comes in, a better policy goes out. An algorithm is its `loss`.

`rollout_algorithm` collects rollouts, `on_policy` is the update that all algorithms share, `advantages` rates the
samples, and `policy_gradient`, `forward`, `rwr` and `draft` add their losses. Those that need finished samples
derive from `whole_episodes`.
"""
