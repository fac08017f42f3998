"""From encoded images and strings to pixels and token ids."""
