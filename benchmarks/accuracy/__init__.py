"""Zero-shot accuracy of every runner on labelled images."""
