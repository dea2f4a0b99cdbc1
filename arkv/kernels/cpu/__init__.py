"""The kernels for CPUs, in C."""
