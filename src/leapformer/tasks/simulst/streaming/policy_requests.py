"""What a policy is: an object that is asked after every chunk of the source, and answers with plain requests.

Each time it is asked, a policy takes a *turn*, a generator of requests:

    Write    a token: the likeliest one, or the one that is named; the answer says which it was
    Save     keep the stream as it is
    Restore  take the stream back to what was saved, with all that was written since
    Read     the turn is over: ask again when there is another chunk

Whoever runs the streams does what is asked (`leapformer.tasks.simulst.streaming.turns`); a policy only looks at its
`Target` and touches nothing. The tokens that many streams ask for at the same time are one batch, whatever their
policies are.

A policy keeps nothing itself, so that one object serves any number of streams: what it wants to remember of one goes
with `Read` and comes back as `Target.memory`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Read:
    """Read another chunk first. `memory` is what `Target.memory` is then; it is never changed in place."""

    memory: Any = None


@dataclass(frozen=True)
class Write:
    """Write the next token; the answer is a `Written`.

    Arguments:
        see: how many states of the source the decoder looks at, at least as many as before; None: all that are there.
            Before the source has ended it is at most `Target.available`.
        token: that is to be written; None: the likeliest.
    """

    see: int | None = None
    token: int | None = None


@dataclass(frozen=True)
class Save:
    """Keep the stream as it is, with all that is available in view, until the turn is over."""


@dataclass(frozen=True)
class Restore:
    """Take the stream back to the last `Save`, as if nothing had been written since."""


Request = Read | Write | Save | Restore


@dataclass(frozen=True)
class Written:
    """The answer to `Write`.

    Attributes:
        token: that was written.
        logits: [V], of which it is the largest unless the policy has named it.
        mass: [layers, heads, chunks], the share of the cross-attention that each chunk had; None unless `keep_mass`.
    """

    token: int
    logits: Tensor
    mass: Tensor | None = None


class Target(Protocol):
    """One stream as its policy sees it. A sentence that has begun anew counts everything from its own start.

    Attributes:
        last: the token written last; at first the one that every sentence begins with.
        written: how many tokens were. room: how many more may be, for now.
        ended: whether the end of the sentence was written. is_open: whether another token may be.
        available: states of the source. chunks: of how many chunks. pre_decision: states of a chunk.
        source_ended: whether no more will come.
        continuous: whether another sentence follows one that ended before its source.
        ends: the tokens that end a sentence.
        memory: what the policy said with its last `Read`; None at the start of a sentence.
    """

    @property
    def last(self) -> int: ...
    @property
    def written(self) -> int: ...
    @property
    def room(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def available(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def pre_decision(self) -> int: ...
    @property
    def source_ended(self) -> bool: ...
    @property
    def continuous(self) -> bool: ...
    @property
    def ends(self) -> Sequence[int]: ...
    @property
    def memory(self) -> Any: ...


# `Write` is answered by a `Written`, the others by None.
Turn = Generator[Request, Any, None]


class Policy(Protocol):
    """`keep_mass`: whether it looks at the attention, which costs the sum of the keys of every chunk."""

    @property
    def keep_mass(self) -> bool: ...

    def turn(self, target: Target) -> Turn:
        """What to do now that a chunk was read, or the source has ended. Returning is a `Read` without a memory."""
        ...
