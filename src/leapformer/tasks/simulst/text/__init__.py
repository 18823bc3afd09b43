"""Text as tokens, and tokens as words."""
