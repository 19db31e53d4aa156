"""Measurements, the report, and the `crossover` command."""
