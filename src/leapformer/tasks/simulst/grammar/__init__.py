"""The built-in grammar: English sentences with their German translations."""
