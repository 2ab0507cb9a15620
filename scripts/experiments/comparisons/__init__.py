"""What the commands that compare many training runs have in common."""
