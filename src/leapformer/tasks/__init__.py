"""The tasks of the paper, one sub-package each: data, tokenizers, metrics."""
