"""Tasks that use embeddings: zero-shot classification, ranking and captions."""
