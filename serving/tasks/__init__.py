"""Tasks on top of embeddings: zero-shot classification, ranking, captions."""
