"""INT8 graphs: activation ranges, Q/DQ nodes, layers kept in floating point."""
