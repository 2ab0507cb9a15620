"""Frozen networks that score: `pretrained` loads them, `devices` says where they and their numbers are."""
