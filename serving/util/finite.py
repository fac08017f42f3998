"""Checks of numbers that callers give: finite in the precision that computes with them."""

from serving.errors import InputError

FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
"""Largest float32, the type of embeddings and logits. Larger numbers become infinite there."""
INT32_MAX = 2**31 - 1
"""Largest int32, the type of sizes and counts in Triton, FAISS and ONNX."""


def is_float32(value: float) -> bool:
    """Return whether `value` is finite as a float32: not NaN, infinite, or too large."""
    return -FLOAT32_MAX <= value <= FLOAT32_MAX


def check_positive(name: str, value: float) -> None:
    """Check that a number, such as a timeout in seconds, is finite and greater than zero.

    Raises:
        InputError: it is not; `name` is that of the argument.
    """
    if not (value > 0 and is_float32(value)):
        raise InputError(f"expected a finite number greater than 0, got {value:g}", name=name)


def check_count(name: str, value: int) -> None:
    """Check that a number of items is from 1 to `INT32_MAX`.

    Raises:
        InputError: it is not; `name` is that of the argument.
    """
    if not 1 <= value <= INT32_MAX:
        raise InputError(f"expected a number from 1 to {INT32_MAX:,}, got {value}", name=name)
