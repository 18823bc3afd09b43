"""When a simultaneous translator reads on, and when it writes: wait-k, local agreement, AlignAtt.

What a policy is stands in `policy_requests`; which ones the commands know, and by which options, in `policy_registry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from leapformer.models.translation_stream import WHOLE_SOURCE, wait_k_needs
from leapformer.tasks.simulst.streaming.policy_requests import Read, Restore, Save, Target, Turn, Write, Written


@dataclass(frozen=True)
class WaitK:
    """Read k chunks, then write a token for every further one; the rest when the source has ended.

    Token i (from 0) sees the first (k + i) r states of the source, as in training. An end of the sentence is believed,
    wherever it comes.

    Arguments:
        k: at least 1; None waits for the whole source.

    Raises ValueError for another k.

    Source: Ma et al. 2019 (arXiv 1810.08398), with a fixed pre-decision ratio r (Ma et al. 2020, arXiv 2011.02048).
    """

    k: int | None = 5

    keep_mass = False

    def __post_init__(self) -> None:
        if self.k is not None:
            _expect_at_least(1, self.k, "k", "chunk, or None for the whole source")

    def turn(self, target: Target) -> Turn:
        while target.is_open:
            see = WHOLE_SOURCE if self.k is None else int(wait_k_needs(self.k, target.written, target.pre_decision))
            if target.available < see and not target.source_ended:
                yield Read()
            yield Write(see)


@dataclass(frozen=True)
class LocalAgreement:
    """Translate all that was read so far, anew after every chunk, and write what the last n translations begin with
    alike.

    A translation goes on from what is written, which is never taken back. Each step sees all that was read. A sentence
    does not end before its source, since every translation of a part ends somewhere (unless it is `continuous`).

    Arguments:
        n: translations that have to agree, at least 2.
        ahead: most tokens of a translation beyond those that are written.

    Raises ValueError for smaller numbers.

    Source: Liu, Spanakis and Niehues 2020 (arXiv 2005.11185), and Polak et al. 2022 (arXiv 2204.06028).
    """

    n: int = 2
    ahead: int = 40

    keep_mass = False

    def __post_init__(self) -> None:
        _expect_at_least(2, self.n, "n", "translations that agree")
        _expect_at_least(1, self.ahead, "ahead", "token")

    def turn(self, target: Target) -> Turn:
        if target.source_ended:
            yield from _write_the_rest(target)
            return
        if not target.available:
            return
        yield Save()
        hypothesis: list[int] = []
        while len(hypothesis) < self.ahead and target.is_open:
            written: Written = yield Write()
            hypothesis.append(written.token)
        yield Restore()
        hypotheses = [*(target.memory or ()), hypothesis][-self.n :]
        agreed = common_prefix(hypotheses) if len(hypotheses) == self.n else []
        if not target.continuous:
            agreed = list(takewhile(lambda token: token not in target.ends, agreed))
        for token in agreed:
            yield Write(token=token)
        yield Read(memory=tuple(hypothesis[len(agreed) :] for hypothesis in hypotheses))


@dataclass(frozen=True)
class AlignAtt:
    """Write as long as the next token looks back: its attention is largest on a chunk that lies `frames` before the
    last.

    Looking at the latest chunks means that the token may depend on what comes next, so that is read first. Each step
    sees all that was read. A sentence does not end before its source (unless it is `continuous`).

    Arguments:
        frames: chunks that the largest share has to lie before the last one read, at least 1.
        layers: whose cross-attention counts, as indices; None: all. The mean is taken over layers and heads.

    Raises ValueError for `frames` below 1, and, in use, for layers that the model does not have.

    Source: Papi, Turchi and Negri 2023 (arXiv 2305.11408), with chunks in the place of single frames.
    """

    frames: int = 1
    layers: tuple[int, ...] | None = None

    keep_mass = True

    def __post_init__(self) -> None:
        _expect_at_least(1, self.frames, "frames", "chunk")

    def turn(self, target: Target) -> Turn:
        if target.source_ended:
            yield from _write_the_rest(target)
            return
        while target.available and target.is_open:
            yield Save()
            written: Written = yield Write()
            early_end = target.ended and not target.continuous
            if early_end or not self.looks_back(written.mass, target.chunks):
                yield Restore()
                yield Read()

    def looks_back(self, mass: Tensor | None, chunks: int) -> bool:
        """Whether the largest share of `mass` [L, H, M] is far enough from the last of `chunks`; not where there is
        none.
        """
        assert mass is not None
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not -len(mass) <= layer < len(mass)]
            if wrong:
                raise ValueError(f"layers: expected indices of {len(mass)} decoder layers, found {wrong[0]}")
            mass = mass[list(self.layers)]
        share = mass[..., :chunks].mean((0, 1))
        return bool(share.max() > 0) and chunks - 1 - int(share.argmax()) >= self.frames


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with."""
    together = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return [tokens[0] for tokens in together]


def _write_the_rest(target: Target) -> Turn:
    """The source has ended, so there is nothing to wait for."""
    while target.is_open:
        yield Write()


def _expect_at_least(least: int, value: int, name: str, what: str) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least} {what}, found {value}")
