"""Simultaneous translation: speech in, words out while it is still being spoken. Each module is imported on its own."""
