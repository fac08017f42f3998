"""Image search: queries, FAISS indexes, and index directories on disk."""
