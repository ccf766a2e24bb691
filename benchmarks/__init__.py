"""Measurements that need no accelerator: what the TPU compiler's own schedule says about the kernels."""
