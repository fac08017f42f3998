"""INT8 graphs: activation ranges, Q/DQ nodes, and the choice of layers to leave unquantized."""

from typing import Literal

Method = Literal["minmax", "percentile", "entropy"]
"""Method that chooses the INT8 range of an activation."""
