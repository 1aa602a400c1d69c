"""What might go beyond four dense 16-bit products, and whether it does: docs/experiments.md."""
