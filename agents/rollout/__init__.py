"""Trajectories: environment steps and scores come in, a complete rollout on the device goes out.

The buffer stores them, `shared_prefix` knows which rows of a batch are still the same, `scores` completes rewards that
arrive late, `timesteps` chooses the steps that an update trains on, and `vec_env` lets Stable-Baselines3 step a
Gymnasium vector environment.
"""
