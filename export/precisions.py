"""Precisions of exported graphs.

This module imports nothing heavy, so that the command line starts fast.
"""

from enum import StrEnum


class Precision(StrEnum):
    """Precision of a graph, as given to `--precision`."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_FP16 = "int8-fp16"
    INT8_DYNAMIC = "int8-dynamic"


DEFAULT_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
"""Precisions exported by default. fp32 is always exported, whatever is requested."""
