"""Corpora of speech: read as they are published, or spoken from text, and prepared for the training."""
