"""Loading and saving of checkpoints: weights, configuration and tokenizer."""
