"""The CUDA path: plans the kernels of a call, compiles them with NVRTC when the call is lowered, packs the program."""
