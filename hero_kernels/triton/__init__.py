"""Kernels in Triton; import its modules only where triton is installed."""
