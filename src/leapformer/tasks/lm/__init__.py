"""Language modelling: corpora, tokenizers, packed blocks, counted baselines and metrics.

The definitions are in docs/data.md. Each module is imported on its own, for example
`from leapformer.tasks.lm.corpora import load_corpus`; this file imports none, so that it costs nothing.
"""
