"""From the name of a checkpoint to weights, configuration and tokenizer."""
