"""Row kernels in Triton; import `hero_kernels.triton.rows` only where triton is installed."""
