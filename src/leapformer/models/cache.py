"""What generation keeps between steps: one `LayerState` per block, in the shape that transformers' `generate` expects.

A linear attention block keeps a state of constant size; a softmax block keeps keys and values that grow.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from leapformer.nn import LayerState


class LeapformerCacheLayer(CacheLayerMixin):
    """The state of one block. `state` is None until the first token; `slots` counts tokens seen, padding included."""

    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.slots = 0

    def store(self, state: LayerState, *, slots: int) -> None:
        """Keep the state that a block returned after `slots` more tokens."""
        self.state = state
        self.slots += slots
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of the state's tensors."""
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> int:
        return self.slots

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def reset(self) -> None:
        self.state = None
        self.slots = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from what row beam_idx[i] has seen."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.length.shape[0], device=self.state.length.device)
            self.state = self.state.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "LeapformerCache.crop: a constant-size state cannot forget tokens; use snapshot and restore"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise _no_keys_and_values()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _no_keys_and_values()


class LeapformerCache(Cache):
    """The states of all blocks of a `LeapformerModel`.

    Example:
        >>> cache = LeapformerCache(num_layers=2)
        >>> cache.get_seq_length(), cache.nbytes
        (0, 0)
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LeapformerCacheLayer() for _ in range(num_layers)])

    def layer(self, number: int) -> LeapformerCacheLayer:
        """What block `number` keeps."""
        layer = self.layers[number]
        assert isinstance(layer, LeapformerCacheLayer)
        return layer

    @property
    def length(self) -> Tensor | None:
        """[B] int64: how many real tokens each row has seen, which is its next position; None before the first."""
        state = self.layer(0).state
        return None if state is None else state.length

    @property
    def nbytes(self) -> int:
        """Bytes of all states: constant for linear attention, growing for softmax."""
        return sum(self.layer(number).nbytes for number in range(len(self.layers)))

    @property
    def max_cache_len(self) -> int:
        """-1, as for every cache without a limit; PEFT asks."""
        return -1

    def snapshot(self) -> "LeapformerCache":
        """An independent copy, to go back to."""
        copy = LeapformerCache(len(self.layers))
        copy.restore(self)
        return copy

    def restore(self, snapshot: "LeapformerCache") -> None:
        """Go back to `snapshot`, which stays usable."""
        for number in range(len(self.layers)):
            layer, kept = self.layer(number), snapshot.layer(number)
            layer.state = None if kept.state is None else kept.state.snapshot()
            layer.slots, layer.is_initialized = kept.slots, kept.is_initialized


def is_prefix(past: Any, layers: int) -> bool:
    """Whether ``past`` is a cache of transformers that holds keys and values for each of so many layers."""
    if not isinstance(past, Cache) or len(past.layers) != layers:
        return False
    return all(isinstance(getattr(layer, "keys", None), Tensor) for layer in past.layers)


def absorbed_prefix(past: Cache, blocks: Any, like: Tensor) -> LeapformerCache:
    """A cache whose blocks have seen the keys and values [B, G, S, K] of another, of prefix tuning; in the dtype of
    ``like``.

    Raises:
        ValueError: another shape, or a block whose attention keeps no state.
    """
    cache = LeapformerCache(len(past.layers))
    for number, (block, layer) in enumerate(zip(blocks, past.layers, strict=True)):
        kept: Any = layer
        keys, values = (x.transpose(1, 2).to(like) for x in (kept.keys, kept.values))
        cache.layer(number).store(block.attention.prefix_state(keys, values), slots=keys.shape[1])
    return cache


def _no_keys_and_values() -> TypeError:
    return TypeError("LeapformerCache keeps one state per block; it has no keys and values to update")
