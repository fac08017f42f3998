"""What an export can be asked for; free of heavy imports, for the command line."""

from enum import StrEnum


class Kind(StrEnum):
    """An artifact of each tower."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_FP16 = "int8-fp16"
    INT8_DYNAMIC = "int8-dynamic"
    TORCHSCRIPT = "torchscript"


class Library(StrEnum):
    """What builds plans; `serving.bundles.engine_facts.Library` as the command line takes it."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


DEFAULT_KINDS = (Kind.FP32, Kind.FP16, Kind.INT8)
"""fp32 is always made."""
