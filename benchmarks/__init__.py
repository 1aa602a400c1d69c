"""Time, memory and exactness of `hero_kernels` beside other implementations of the same loss."""
