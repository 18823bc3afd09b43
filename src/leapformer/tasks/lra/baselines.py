"""Trivial baselines, which every score stands beside: the commonest label, and for ListOps the first symbol alone."""

from __future__ import annotations

import numpy as np

from leapformer.tasks.lra.dataset import LraDataset


def majority_baseline(train: LraDataset, evaluated: LraDataset) -> float:
    """Accuracy on `evaluated` of always saying the commonest label of `train`."""
    commonest = np.bincount(train.labels).argmax()
    return float((evaluated.labels == commonest).mean())


def root_operator_baseline(train: LraDataset, evaluated: LraDataset) -> float:
    """Accuracy of the commonest label for each first symbol, counted on `train`: what a model gets that reads one
    token.

    It is 36.3 % on generated data, and the plateau of 36 to 39 % in the literature is that.
    """
    counts = np.zeros((train.vocab_size, train.num_classes), dtype=np.int64)
    np.add.at(counts, (_first_symbols(train), train.labels), 1)
    return float((counts.argmax(axis=1)[_first_symbols(evaluated)] == evaluated.labels).mean())


def _first_symbols(dataset: LraDataset) -> np.ndarray:
    return np.array([dataset[index]["input_ids"][0] for index in range(len(dataset))])
