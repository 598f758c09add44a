"""Formats of quantized weights that the native kernels compute with."""

BITS, GROUP_SIZES = (4, 8), (32, 64, 128)


def has_kernel(mode: str, bits: object, group_size: object) -> bool:
    """Whether products with weights of a format have a kernel."""
    return mode == "affine" and bits in BITS and group_size in GROUP_SIZES
