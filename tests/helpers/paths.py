"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Older versions of diffusers need the file's name where the Hub is offline, as in these tests."""
