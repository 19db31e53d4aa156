"""What is measured, the report, and the `crossover` command."""
