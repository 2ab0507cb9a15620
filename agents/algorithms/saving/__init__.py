"""An algorithm as tensors and plain values: in a file of its own, and in the checkpoints of a run."""
