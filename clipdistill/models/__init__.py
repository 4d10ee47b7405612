"""Frozen models and the student, prompt sets and class embeddings."""
