"""What all benchmarks stand on: processes, progress, timing, folders, formats."""
