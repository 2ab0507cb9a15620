"""What watches a run beside training: held-out images and what is measured on them, and the rules that end a run."""
