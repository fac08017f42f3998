"""Image and text towers as torch modules, with the inputs and outputs of the exported graphs."""
