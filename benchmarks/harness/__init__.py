"""Common ground of all benchmarks: processes, progress, timing, folders, formats."""
