"""Precisions that an export can be asked for; free of heavy imports, for the command line."""

from enum import StrEnum


class Precision(StrEnum):
    """Precision of a graph."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_FP16 = "int8-fp16"
    INT8_DYNAMIC = "int8-dynamic"


DEFAULT_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
"""fp32 is always exported."""
