"""The kernels of csrc/cuda, one file each: what they are compiled with, what fits, which tiles, what they cost."""
