"""The machine: devices, kernels, packages."""
