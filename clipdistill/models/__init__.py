"""Frozen and trained towers, prompt sets and class embeddings."""
