"""Image search: queries, FAISS indexes and their storage."""
