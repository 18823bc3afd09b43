"""Four feature frames become one encoder state: two convolutions of stride 2, whole or frame by frame.

Letters: B batch, F feature frames, M features of a frame (mel bins), C channels, T states, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapformer.nn.plain import home_of, is_plain

KERNEL, STRIDE = 3, 2


Length = TypeVar("Length", int, Tensor)


def subsampled_length(frames: Length) -> Length:
    """T = ceil(F / 4), the states of F feature frames; F may be an integer tensor."""
    return (frames + STRIDE**2 - 1) // STRIDE**2


@dataclass(frozen=True)
class SubsamplingCache:
    """What the next states need of the past: one or two inputs of each convolution, [B, 1, 1 or 2, M] and [B, C,
    ...].
    """

    inputs: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.inputs)

    def reorder(self, index: Tensor) -> SubsamplingCache:
        """Row b of the result is row index[b] of this cache."""
        return replace(self, inputs=tuple(x.index_select(0, index) for x in self.inputs))

    @staticmethod
    def join(caches: list[SubsamplingCache]) -> SubsamplingCache:
        """The rows of several caches behind one another; each has got a multiple of 4 frames, or as many beyond one."""
        return SubsamplingCache(tuple(torch.cat(inputs) for inputs in zip(*(c.inputs for c in caches), strict=True)))


class ConvSubsampling(nn.Module):
    """Two Conv2d (kernel 3, stride 2, padding 1) with ReLU over time and features, then a linear layer.

    State j sees frames 4j - 3 ... 4j + 3, so the states of a prefix of 4n frames are final, all n of them. What lies
    before the first and after the last frame of an utterance is zero for both convolutions. The last state of F frames,
    F no multiple of 4, therefore exists (T = ceil(F / 4)) and sees the 1 to 3 frames that there are.

    Args:
        features: M. hidden_size: D. channels: C, of both convolutions.

    Source: the front end of arXiv 2405.13046, sec. 4.3 (80 features, 256 channels: 80 -> 40 -> 20, then 5120 -> D).
    """

    def __init__(self, features: int, hidden_size: int, *, channels: int = 256) -> None:
        super().__init__()
        self.features, self.channels = features, channels
        self.convs = nn.ModuleList(
            nn.Conv2d(before, channels, KERNEL, stride=STRIDE, padding=1) for before in (1, channels)
        )
        self.proj = nn.Linear(channels * subsampled_length(features), hidden_size)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x [B, F, M] -> [B, T, D]; states beyond ceil(lengths / 4) are 0.

        lengths: int64 [B], real frames of each row; None: all. Padding frames may hold anything, even NaN: they are
        zero for both convolutions, as what follows the end of an utterance is.
        """
        hidden = self._check(x)[:, None]
        if lengths is not None:
            hidden = hidden.masked_fill(_padding(hidden, lengths), 0)
        for conv in self.convs:
            lengths = None if lengths is None else (lengths + 1) // STRIDE
            if hidden.shape[2]:
                hidden = conv(hidden)
                if lengths is not None:
                    # In place and unseen by autograd, which would copy all of it twice: where the output is 0, the
                    # gradient that ReLU passes on is 0 already.
                    with torch.no_grad():
                        hidden.masked_fill_(_padding(hidden, lengths), 0)
                hidden = torch.relu_(hidden)
            else:  # PyTorch has no convolution of nothing
                hidden = hidden.new_zeros(len(x), self.channels, 0, subsampled_width(hidden.shape[3]))
        states = self._project(hidden)
        if lengths is None:
            return states
        return states.masked_fill(~_real(states.shape[1], lengths)[..., None], 0)

    def empty_cache(self, batch: int) -> SubsamplingCache:
        """The cache of utterances that have not begun: the zeros before their first frame."""
        width, inputs, home = self.features, [], home_of(self.proj)
        for channels in (1, self.channels):
            inputs.append(torch.zeros(batch, channels, 1, width, **home))
            width = subsampled_width(width)
        return SubsamplingCache(tuple(inputs))

    def push(self, x: Tensor, cache: SubsamplingCache) -> tuple[Tensor, SubsamplingCache]:
        """The states [B, n, D] that F more frames x [B, F, M] complete, and the cache after them.

        After 4n frames in all, n states have come; their values are those of ``forward`` over the whole.
        """
        return self._run(self._check(x)[:, None], cache, ends=False)

    def finish(self, cache: SubsamplingCache) -> Tensor:
        """The last state [B, 0 or 1, D], which waited for frames that did not come."""
        return self._run(cache.inputs[0][:, :, :0], cache, ends=True)[0]

    def _run(self, hidden: Tensor, cache: SubsamplingCache, *, ends: bool) -> tuple[Tensor, SubsamplingCache]:
        kept = []
        for conv, past in zip(self.convs, cache.inputs, strict=True):
            seen = torch.cat([past, hidden.to(past.dtype)], dim=2)
            # An output is centred on every other input; the first of ``seen`` is the one before such a centre.
            if ends and seen.shape[2] % STRIDE == 0:
                seen = F.pad(seen, (0, 0, 0, 1))
            outputs = (seen.shape[2] - 1) // STRIDE
            if outputs:
                hidden = torch.relu(_without_time_padding(conv, seen, outputs))
            else:
                hidden = seen.new_zeros(len(seen), self.channels, 0, subsampled_width(seen.shape[3]))
            kept.append(seen[:, :, STRIDE * outputs :].clone())  # a view would keep all frames alive
        return self._project(hidden), SubsamplingCache(tuple(kept))

    def _project(self, hidden: Tensor) -> Tensor:
        """hidden [B, C, T, ceil(M / 4)] -> [B, T, D]."""
        return self.proj(hidden.transpose(1, 2).flatten(2))

    def _check(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.features:
            raise ValueError(f"features: expected shape [batch, frames, {self.features}], got {list(x.shape)}")
        return x


def _without_time_padding(conv: nn.Module, seen: Tensor, outputs: int) -> Tensor:
    """The first ``outputs`` of a convolution whose first window begins with seen [B, C, F, M], not with its padding."""
    if is_plain(conv, nn.Conv2d):
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(seen, conv.weight, conv.bias, stride=STRIDE, padding=(0, 1))
    # A row in front moves the windows by one output; the module itself pads, and is called as it is.
    return conv(F.pad(seen, (0, 0, 1, 0)))[:, :, 1 : 1 + outputs]


def subsampled_width(width: int) -> int:
    """The features that one convolution leaves of ``width``."""
    return -(-width // STRIDE)


def _real(T: int, lengths: Tensor) -> Tensor:
    """bool [B, T], True below lengths [B]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def _padding(hidden: Tensor, lengths: Tensor) -> Tensor:
    """bool [B, 1, F, 1], True in the frames of hidden [B, C, F, M] from lengths [B] on."""
    return ~_real(hidden.shape[2], lengths)[:, None, :, None]
