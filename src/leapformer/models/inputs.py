"""What transformers, PEFT and data collators hand to `forward`, brought to the one form that the blocks work with.

Letters: B rows, T new tokens, N packed sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapformer.files.showing import shown
from leapformer.models.cache import LeapformerCache
from leapformer.nn.packing import check_packing, token_positions

# What may come along and changes nothing: hints for other attention kernels, and what generation and PEFT pass through.
PASSED_BY = frozenset(
    {
        "adapter_names",
        "alora_offsets",
        "cache_position",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_router_logits",
        "return_loss",
        "task_ids",
        "tokenizer",
    }
)
# Other names of packed sequences: those of transformers' flash attention, and the number of each token's sequence.
PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def check_rest(name: str, config: Any, output_attentions: bool | None, rest: dict[str, Any]) -> None:
    """Refuse what would silently be left undone: attention weights, and keywords that nobody knows.

    Raises:
        ValueError: output_attentions. TypeError: another keyword, as Python itself would.
    """
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            f"{name}: expected output_attentions=False (no attention weights are formed, linear attention has none), "
            "found True"
        )
    if not rest:
        return
    unknown = sorted(key for key, value in rest.items() if key not in PASSED_BY and value is not None)
    if unknown:
        raise TypeError(f"{name}: unexpected keyword {shown(unknown[0])}")


def wanted(value: bool | None, config: Any, field: str) -> bool:
    """An argument of `forward` such as output_hidden_states or return_dict, or where it is None what the configuration
    says.
    """
    return bool(getattr(config, field) if value is None else value)


class Layout(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        key_mask: bool [B, T], True = real; None where all are.
        position_ids: int64 [1 or B, T].
        cu_seqlens: int [N + 1] of packed sequences, or None.
        rows: B where several rows were put behind one another into one, [1, B T] (then so are the fields above), else
            None.
        counted: whether positions were counted here, so that none is beyond the number of slots.
    """

    key_mask: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor | None = None
    rows: int | None = None
    counted: bool = True

    def flat(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, D] as the blocks take it."""
        return hidden if self.rows is None else hidden.reshape(1, -1, hidden.shape[-1])

    def unflat(self, hidden: Tensor) -> Tensor:
        """hidden as the caller knows it, [B, T, D]."""
        return hidden if self.rows is None else hidden.reshape(self.rows, -1, hidden.shape[-1])


def read_layout(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    cache: LeapformerCache | None,
    cu_seqlens: Tensor | None,
    told: dict[str, Tensor | None],
) -> Layout:
    """The layout of B, T new tokens.

    Sequences packed into a row are told by cu_seqlens or told["cu_seq_lens_q"]; or for each token, in one row or
    several, by told["seq_idx"], by numbers from 1 in attention_mask, or, where there is neither mask nor cache, by
    position_ids that don't go on by 1 (as in transformers). Values are looked at in eager mode only, so in a compiled
    graph the last two don't tell.

    Raises:
        ValueError: shapes that don't fit, ways of telling that contradict one another, or packing beside a cache.
    """
    B, T = shape
    past = 0 if cache is None else cache.get_seq_length()
    position_ids = _checked_positions(position_ids, B, T)
    numbers = _new_values(attention_mask, B, T, past)
    explicit = cu_seqlens is not None or any(value is not None for value in told.values())
    looks = T > 1 and not explicit and not torch.compiler.is_compiling()
    begins, mask = None, None if numbers is None else numbers.bool()
    if looks and numbers is not None and numbers.dtype != torch.bool and has_other_than_bits(numbers):
        begins = _begins_by_numbers(numbers)
    elif looks and position_ids is not None and numbers is None and cache is None:
        begins = _begins_by_positions(position_ids.expand(B, T))
    elif looks and position_ids is not None:
        _refuse_restart(position_ids, mask)
    bounds = _bounds(shape, begins, cu_seqlens, told)
    if bounds is not None:
        bounds = bounds.to(device)
        if cache is not None:
            raise ValueError("past_key_values: expected none beside packed sequences, found a LeapformerCache")
    rows = B if bounds is not None and B > 1 and cu_seqlens is None and told.get("cu_seq_lens_q") is None else None
    if rows is None and bounds is not None:
        check_packing("model", shape, bounds)
    mask = _none_if_all_real(mask)
    if rows is not None:
        mask = None if mask is None else mask.reshape(1, -1)
        position_ids = None if position_ids is None else position_ids.expand(B, T).reshape(1, -1)
        T = B * T
    if position_ids is not None:
        return Layout(mask, position_ids, bounds, rows, counted=False)
    first = None if cache is None else cache.length
    return Layout(mask, token_positions(T, device, key_mask=mask, cu_seqlens=bounds, first=first), bounds, rows)


def read_mask(attention_mask: Tensor | dict[str, Tensor] | None, batch: int, tokens: int) -> Tensor | None:
    """The mask [B, T] bool of an encoder, or None where all are real.

    Raises:
        ValueError: another shape, or values other than 0 and 1.
    """
    numbers = _new_values(attention_mask, batch, tokens, 0)
    if numbers is None:
        return None
    if numbers.dtype != torch.bool and not torch.compiler.is_compiling() and has_other_than_bits(numbers):
        raise ValueError("attention_mask: expected 1 = real and 0 = padding (an encoder packs nothing), found others")
    return _none_if_all_real(numbers.bool())


def _new_values(mask: Tensor | dict[str, Tensor] | None, batch: int, tokens: int, past: int) -> Tensor | None:
    """What the mask says of the new tokens, [B, T] of any dtype."""
    if isinstance(mask, dict):
        # transformers makes one entry per layer type; ours are all the same.
        mask = next(iter(mask.values()), None)
    if mask is None:
        return None
    widths = (tokens, past + tokens)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in widths:
        raise ValueError(
            f"attention_mask: expected [{batch}, {tokens}] or, with the cached tokens, [{batch}, {past + tokens}], "
            f"found {list(mask.shape)}"
        )
    return mask[:, mask.shape[1] - tokens :]


def _none_if_all_real(mask: Tensor | None) -> Tensor | None:
    # Without padding the attention is faster without a mask. Looking costs a synchronisation on other devices.
    if mask is None or (mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())):
        return None
    return mask


def has_other_than_bits(numbers: Tensor) -> bool:
    """Whether a mask holds anything but 0 and 1; a synchronisation on a GPU."""
    return bool(((numbers != 0) & (numbers != 1)).any())


def _checked_positions(position_ids: Tensor | None, B: int, T: int) -> Tensor | None:
    if position_ids is None:
        return None
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ValueError(f"position_ids: expected [1 or {B}, {T}], found {list(position_ids.shape)}")
    return position_ids


def _begins_by_numbers(numbers: Tensor) -> Tensor:
    """bool [B, T], True where a packed sequence begins, of a mask that numbers them from 1 with 0 for padding."""
    whole = numbers.long()
    seen = whole.cummax(1).values  # padding belongs to the sequence before it
    if bool(((whole != numbers) | (whole < 0) | ((whole != 0) & (whole != seen))).any()):
        raise ValueError(
            "attention_mask: expected 1 = real and 0 = padding, or the rising numbers of packed sequences (1, 1, 2, 2, "
            "0), "
            "found others"
        )
    changes = (seen[:, 1:] != seen[:, :-1]) & (seen[:, :-1] != 0)
    return torch.nn.functional.pad(changes, (1, 0), value=True)


def _begins_by_positions(positions: Tensor) -> Tensor:
    return torch.nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)


def _refuse_restart(positions: Tensor, mask: Tensor | None) -> None:
    """Positions that fall back among real tokens tell of packing, which a mask or a cache beside them contradicts."""
    real = positions if mask is None else positions.expand(mask.shape).masked_fill(~mask, -1)
    highest = real.cummax(1).values
    falls = real[:, 1:] <= highest[:, :-1]
    if mask is not None:
        falls = falls & mask[:, 1:]
    if bool(falls.any()):
        beside = "a cache" if mask is None else "an attention_mask"
        raise ValueError(
            f"position_ids: expected rising numbers beside {beside}, found a restart (packed sequences: give "
            "cu_seqlens)"
        )


def _bounds(
    shape: tuple[int, int], begins: Tensor | None, cu_seqlens: Tensor | None, told: dict[str, Tensor | None]
) -> Tensor | None:
    """cu_seqlens of the row or of all rows behind one another; None where no row has more than one sequence."""
    other, keys, numbers = (told.get(name) for name in PACKING_NAMES)
    if keys is not None and (other is None or not _same(other, keys)):
        raise ValueError(
            "cu_seq_lens_k: expected cu_seq_lens_q and the same bounds in it (self-attention), found others"
        )
    if cu_seqlens is not None and other is not None and not _same(cu_seqlens, other):
        raise ValueError("cu_seq_lens_q: expected the bounds of cu_seqlens, found others")
    if cu_seqlens is not None or other is not None:
        return other if cu_seqlens is None else cu_seqlens
    if numbers is not None:
        if tuple(numbers.shape) != shape:
            raise ValueError(f"seq_idx: expected {list(shape)}, found {list(numbers.shape)}")
        begins = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    if begins is None:
        return None
    starts = begins.flatten().nonzero()[:, 0]
    if len(starts) == shape[0]:
        return None
    return torch.nn.functional.pad(starts, (0, 1), value=begins.numel()).to(torch.int32)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two bounds are equal, as far as that can be told without a synchronisation."""
    if a is b or a.shape != b.shape:
        return a is b
    return a.device.type != "cpu" or torch.compiler.is_compiling() or torch.equal(a.long().cpu(), b.long().cpu())
