"""Assembly of Triton model repositories, and the embedded Triton server that serves them."""
