"""When a simultaneous translator reads on, and when it writes: wait-k, local agreement, AlignAtt.

A policy is asked after every chunk of the source, and once more when the source has ended. It is a generator: what it yields
are steps of the decoder, what it gets back is what each step proposes, and it writes tokens as it likes; when it returns, the
next chunk is read. So wait-k decides by arithmetic before anything is touched; one that has to look ahead saves the decoder
first and goes back to it. The steps of many streams run as one batch, whatever their policies ask for.

A policy keeps nothing itself: one object serves any number of streams, and what it remembers of one lies in its `Target`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from torch import Tensor

from leapformer.models.translation_stream import WHOLE_SOURCE, wait_k_needs


@dataclass(frozen=True)
class Step:
    """Run the decoder on `token`, the one before the wanted one, with the first `see` states of the source in view."""

    token: int
    see: int


@dataclass(frozen=True)
class Candidate:
    """What a step proposes.

    Attributes:
        token: the most likely next one.
        logits: [V].
        mass: [layers, heads, chunks], the share of the cross-attention that each chunk has; None unless `keep_mass`.
    """

    token: int
    logits: Tensor
    mass: Tensor | None = None


class Target(Protocol):
    """One stream as its policy sees it. A sentence that has begun anew counts everything from its own start.

    Attributes:
        last: the token written last; at first the one that every sentence begins with.
        written: how many tokens were. room: how many more may be, for now.
        available: states of the source. chunks: of how many chunks.
        pre_decision: states of a chunk.
        source_ended: whether no more will come. ended: whether the end of the sentence was written.
        continuous: whether another sentence follows one that ended before its source.
        ends: the tokens that end a sentence.
        memory: what the policy wants to keep until it is asked again; None at the start of a sentence; never changed in place.
    """

    last: int
    written: int
    available: int
    source_ended: bool
    ended: bool
    memory: Any

    @property
    def room(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def pre_decision(self) -> int: ...
    @property
    def continuous(self) -> bool: ...
    @property
    def ends(self) -> Sequence[int]: ...

    def write(self, token: int) -> None:
        """Write a token, for good."""

    def save(self) -> None:
        """Keep the decoder as it is, with all that is available in view."""

    def restore(self) -> None:
        """Take the decoder back to what `save` kept."""


Steps = Generator[Step, Candidate, None]


class Policy(Protocol):
    """What a policy is; `keep_mass`: whether it looks at the attention."""

    @property
    def keep_mass(self) -> bool: ...

    def write(self, target: Target) -> Steps:
        """Write what can be written now, then return."""
        ...


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
            _expect_at_least_1(self.k, "k", "chunk, or None for the whole source")

    def write(self, target: Target) -> Steps:
        while target.room > 0 and not target.ended:
            see = WHOLE_SOURCE if self.k is None else int(wait_k_needs(self.k, target.written, target.pre_decision))
            if target.available < see and not target.source_ended:
                return
            candidate = yield Step(target.last, see)
            target.write(candidate.token)


@dataclass(frozen=True)
class LocalAgreement:
    """Translate all that was read so far, anew after every chunk, and write what the last n translations begin with alike.

    A translation goes on from what is written, which is never taken back. Each step sees all that was read. A sentence does
    not end before its source, since every translation of a part ends somewhere (unless it is `continuous`).

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
        if self.n < 2:
            raise ValueError(f"n: expected at least 2 translations that agree, found {self.n}")
        _expect_at_least_1(self.ahead, "ahead", "token")

    def write(self, target: Target) -> Steps:
        if target.source_ended:
            yield from _write_the_rest(target)
            return
        if not target.available:
            return
        target.save()
        hypothesis: list[int] = []
        while len(hypothesis) < min(self.ahead, target.room) and not (hypothesis and hypothesis[-1] in target.ends):
            candidate = yield Step(hypothesis[-1] if hypothesis else target.last, target.available)
            hypothesis.append(candidate.token)
        target.restore()
        hypotheses = [*(target.memory or ()), hypothesis][-self.n :]
        agreed = common_prefix(hypotheses) if len(hypotheses) == self.n else []
        if not target.continuous:
            agreed = list(takewhile(lambda token: token not in target.ends, agreed))
        for token in agreed:
            yield Step(target.last, target.available)
            target.write(token)
        if not target.ended:
            target.memory = tuple(hypothesis[len(agreed) :] for hypothesis in hypotheses)


@dataclass(frozen=True)
class AlignAtt:
    """Write as long as the next token looks back: its attention is largest on a chunk that lies `frames` before the last.

    Looking at the latest chunks means that the token may depend on what comes next, so that is read first. Each step sees
    all that was read. A sentence does not end before its source (unless it is `continuous`).

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
        _expect_at_least_1(self.frames, "frames", "chunk")

    def write(self, target: Target) -> Steps:
        if target.source_ended:
            yield from _write_the_rest(target)
            return
        while target.available and target.room > 0 and not target.ended:
            target.save()
            candidate = yield Step(target.last, target.available)
            early_end = candidate.token in target.ends and not target.continuous
            if early_end or not self.looks_back(candidate.mass, target.chunks):
                target.restore()
                return
            target.write(candidate.token)

    def looks_back(self, mass: Tensor | None, chunks: int) -> bool:
        """Whether the largest share of `mass` [L, H, M] is far enough from the last of `chunks`; not where there is none."""
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


def _write_the_rest(target: Target) -> Steps:
    """The source has ended, so there is nothing to wait for."""
    while target.room > 0 and not target.ended:
        candidate = yield Step(target.last, target.available)
        target.write(candidate.token)


def _expect_at_least_1(value: int, name: str, what: str) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1 {what}, found {value}")
