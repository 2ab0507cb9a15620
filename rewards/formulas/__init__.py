"""Rewards that a formula gives: no model is loaded. A JPEG file's size, how smooth a video is, where points are."""
