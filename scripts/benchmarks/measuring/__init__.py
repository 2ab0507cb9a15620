"""What the benchmarks share; this folder holds no command."""
