"""INT8 graphs: activation ranges, Q/DQ nodes, layers kept in floating point."""

from typing import Literal

Method = Literal["minmax", "percentile", "entropy"]
"""How the range of an activation is chosen for INT8."""
