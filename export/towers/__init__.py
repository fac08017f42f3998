"""The image and text towers as torch modules, with the boundary of every exported graph."""
