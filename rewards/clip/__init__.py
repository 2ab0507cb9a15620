"""Rewards from CLIP embeddings: CLIPScore, the aesthetic predictor, PickScore and HPS v2.

In come decoded images and their prompts; out comes one score per image.
"""
