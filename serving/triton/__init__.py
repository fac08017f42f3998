"""Model repositories, and the Triton server that serves them."""
