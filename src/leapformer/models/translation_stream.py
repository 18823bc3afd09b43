"""The simultaneous translation model step by step: an encoder stream and a decoder stream, at the level of features and
tokens.

    encoder, decoder = EncoderStream.begin(model), DecoderStream.begin(model, k=3)
    decoder.feed(encoder.push(frames))          # the states of the chunks that these frames complete
    while decoder.can_write().all(): ...        # READ or WRITE, before anything is touched
        logits = decoder.step(token)            # the token written last; at first bos_token_id
    decoder.feed(encoder.finish()); decoder.finish()

Both give what the parallel form gives, and both keep a state of constant size where attention is linear. A stream holds
one or several utterances as rows; ``reorder`` picks rows, ``join`` puts streams together, so many independent
utterances make one batch for a step.

What a layer keeps and how it goes on is the layer's own matter: `leapformer.nn.AttentionLayer`,
`leapformer.nn.LayerState`.

Letters: B rows (utterances), n states or chunks that are new, S states, D hidden size, L layers, H query heads, M
chunks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leapformer.models.translation import LeapformerForConditionalGeneration, SourceStates, check_target_length
from leapformer.nn import AttentionLayer, DecoderBlock, LayerState
from leapformer.nn.plain import home_of
from leapformer.nn.subsampling import SubsamplingCache

# A k that no source is longer than: such a row waits for the end.
WHOLE_SOURCE = 2**40


# ---- the encoder -----------------------------------------------------------------------------------------------------


@dataclass
class EncoderStream:
    """Encoder states of utterances that are still coming in, chunk by chunk; made by ``begin``.

    Attributes:
        model: whose encoder runs, in evaluation mode.
        cache: of the front end for speech. waiting: embedded states [B, below r, D] of a chunk that is not complete.
        length: int64 [B], states handed out so far (on the CPU).
        states: of every block (context "chunk").
        prefix: all embedded states so far [B, S, D], from which context "full" encodes anew at each read.
        finished: whether ``finish`` was called.
    """

    model: LeapformerForConditionalGeneration
    cache: SubsamplingCache | None
    waiting: Tensor
    length: Tensor
    states: list[LayerState]
    prefix: Tensor | None
    finished: bool = False

    @classmethod
    def begin(cls, model: LeapformerForConditionalGeneration, batch: int = 1) -> EncoderStream:
        """The stream of ``batch`` utterances that have not begun. Raises ValueError for a model in training mode."""
        _check_evaluation(model)
        encoder, config = model.encoder, model.config
        none = torch.zeros(batch, 0, config.hidden_size, **home_of(encoder.norm))
        full = config.context == "full"
        return cls(
            model=model,
            cache=None if encoder.subsampling is None else encoder.subsampling.empty_cache(batch),
            waiting=none,
            length=torch.zeros(batch, dtype=torch.int64),
            states=[] if full else [block.attention.empty_state(none) for block in encoder.layers],
            prefix=none if full else None,
        )

    @torch.no_grad()
    def push(self, source: Tensor) -> Tensor:
        """The encoder states [B, n, D] of all chunks that are complete with these features [B, F, num_features] or ids
        [B, F].

        With context "full" they are those of all chunks so far, encoded anew, wherever a chunk was completed; push no
        more than one chunk at a time where earlier tokens must not know of later ones.

        Raises ValueError after ``finish``.
        """
        if self.finished:
            raise ValueError("EncoderStream.push: expected an unfinished stream, found a finished one")
        encoder = self.model.encoder
        if encoder.subsampling is None or self.cache is None:
            new = encoder.embed_text(source)
        else:
            new, self.cache = encoder.subsampling.push(source, self.cache)
        return self._encode(torch.cat([self.waiting, new], dim=1), whole_chunks=True)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The states [B, n, D] that were waiting for a chunk to be complete (context "full": all, encoded anew, if any
        did).
        """
        encoder, rest = self.model.encoder, self.waiting
        if encoder.subsampling is not None and self.cache is not None and not self.finished:
            rest = torch.cat([rest, encoder.subsampling.finish(self.cache)], dim=1)
        self.finished = True
        return self._encode(rest, whole_chunks=False)

    def _encode(self, x: Tensor, *, whole_chunks: bool) -> Tensor:
        chunk = self.model.config.pre_decision
        ready = x.shape[1] // chunk * chunk if whole_chunks else x.shape[1]
        self.waiting, x = x[:, ready:].clone(), x[:, :ready]
        if not ready:
            return x
        if self.prefix is not None:
            self.prefix = torch.cat([self.prefix, x], dim=1)
            hidden, _ = self.model.encoder(self.prefix)
        else:
            hidden, self.states = self.model.encoder(x, first=self.length, states=self.states)
        self.length = self.length + ready
        return hidden

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: the same at the end of every chunk, unless attention is softmax or context
        full.
        """
        tensors = [self.waiting, self.length, *([] if self.prefix is None else [self.prefix])]
        cache = 0 if self.cache is None else self.cache.nbytes
        return cache + _nbytes(tensors) + sum(state.nbytes for state in self.states)

    def reorder(self, index: Tensor) -> EncoderStream:
        """A stream of its own whose row b goes on from row index[b] of this one; ``index`` int64 of any length."""
        here = index.to(self.waiting.device)
        return replace(
            self,
            cache=None if self.cache is None else self.cache.reorder(here),
            waiting=self.waiting.index_select(0, here),
            length=self.length.index_select(0, index.to("cpu")),
            states=[state.take(here) for state in self.states],
            prefix=None if self.prefix is None else self.prefix.index_select(0, here),
        )

    def snapshot(self) -> EncoderStream:
        """An independent copy, to go back to."""
        return self.reorder(torch.arange(len(self.length)))

    def restore(self, snapshot: EncoderStream) -> None:
        """Go back to ``snapshot``, which stays usable."""
        _take_over(self, snapshot.snapshot())

    @staticmethod
    def join(streams: Sequence[EncoderStream]) -> EncoderStream:
        """One stream with the rows of several, which may have come to different chunks.

        Raises ValueError where they are not all at the end of a chunk, or (context "full") at the same one.
        """
        caches = [stream.cache for stream in streams if stream.cache is not None]
        shapes = {(s.waiting.shape[1], s.finished, 0 if s.prefix is None else s.prefix.shape[1]) for s in streams}
        shapes_of_caches = {tuple(x.shape[2] for x in cache.inputs) for cache in caches}
        if len(shapes) > 1 or len(shapes_of_caches) > 1:
            raise ValueError("EncoderStream.join: expected streams at the same place of a chunk, found different ones")
        prefixes = [stream.prefix for stream in streams if stream.prefix is not None]
        return replace(
            streams[0],
            cache=SubsamplingCache.join(caches) if caches else None,
            waiting=torch.cat([stream.waiting for stream in streams]),
            length=torch.cat([stream.length for stream in streams]),
            states=[LayerState.join(layer) for layer in zip(*(stream.states for stream in streams), strict=True)],
            prefix=torch.cat(prefixes) if prefixes else None,
        )

    def put(self, index: Tensor, part: EncoderStream) -> None:
        """Row b of ``part`` takes the place of row index[b]: what was taken out by ``reorder``, and has gone on, goes
        back.

        Raises ValueError where one of the two is not at the end of a chunk, or context is "full".
        """
        if self.waiting.shape[1] or part.waiting.shape[1] or self.prefix is not None:
            raise ValueError("EncoderStream.put: expected streams at the end of a chunk, found other ones")
        here = index.to(self.waiting.device)
        if self.cache is not None and part.cache is not None:
            for own, new in zip(self.cache.inputs, part.cache.inputs, strict=True):
                own.index_copy_(0, here, new)
        self.length = self.length.index_copy(0, index.to("cpu"), part.length)
        for own, new in zip(self.states, part.states, strict=True):
            own.put(here, new)

    def split(self) -> list[EncoderStream]:
        """Each row as a stream of its own."""
        return [self.reorder(torch.tensor([row])) for row in range(len(self.length))]


# ---- the decoder -----------------------------------------------------------------------------------------------------


def wait_k_needs(k: int | Tensor, written: int | Tensor, ratio: int) -> int | Tensor:
    """(k + i) r: the source states that the token after ``written`` ones is to see, if the source has so many."""
    return (k + written) * ratio


@dataclass
class DecoderStream:
    """A decoder that writes one token at a time, each from its own g(i) source states; made by ``begin``.

    Of the source it keeps sums over the states seen so far, S and z of every cross-attention (softmax: their keys and
    values), and the states that no token may see yet. All counts are int64 [B] on the CPU:

    Attributes:
        model: whose decoder runs, in evaluation mode.
        k: chunks to be read before the first token (``WHOLE_SOURCE``: all); may be changed between steps.
        written: tokens so far. available: source states fed so far. seen: those that are in the sums.
        finished: bool [B], whether the source has ended.
        own, cross: states of self-attention and cross-attention of every block.
        waiting: for each row, states [., D] that were fed and not seen.
        keep_mass, mass: the share of the attention that each chunk had in the last step, [B, L, H, M].
    """

    model: LeapformerForConditionalGeneration
    k: Tensor
    written: Tensor
    available: Tensor
    seen: Tensor
    finished: Tensor
    own: list[LayerState]
    cross: list[LayerState]
    waiting: list[Tensor]
    keep_mass: bool = False
    mass: Tensor | None = None

    @classmethod
    def begin(
        cls,
        model: LeapformerForConditionalGeneration,
        batch: int = 1,
        *,
        k: int | Tensor | None = None,
        keep_mass: bool = False,
    ) -> DecoderStream:
        """The stream of ``batch`` utterances of which nothing was read or written.

        k: at least 1, for all or int64 [B]; None, or below 1 in a tensor: wait for the whole source.
        keep_mass: keep what ``mass`` needs, for policies that look at the attention (2 K floats per chunk, head and
        layer).

        Raises ValueError for an integer below 1, and for a model in training mode.
        """
        _check_evaluation(model)
        if isinstance(k, int) and k < 1:
            raise ValueError(f"k: expected at least 1 chunk, or None for the whole source, found {k}")
        k = torch.full((batch,), WHOLE_SOURCE if k is None else k) if not isinstance(k, Tensor) else k.to("cpu")
        none = torch.zeros(batch, 0, model.config.hidden_size, **home_of(model.decoder.norm))
        blocks = model.decoder.layers
        return cls(
            model=model,
            k=torch.where(k < 1, WHOLE_SOURCE, k).to(torch.int64).expand(batch).clone(),
            written=torch.zeros(batch, dtype=torch.int64),
            available=torch.zeros(batch, dtype=torch.int64),
            seen=torch.zeros(batch, dtype=torch.int64),
            finished=torch.zeros(batch, dtype=torch.bool),
            own=[block.attention.empty_state(none) for block in blocks],
            cross=[_over_source(block).empty_state(none, keep_mass=keep_mass) for block in blocks],
            waiting=list(none),
            keep_mass=keep_mass,
        )

    def feed(self, states: Tensor, lengths: Tensor | None = None, *, rows: Sequence[int] | None = None) -> None:
        """More encoder states [B, n, D], real up to ``lengths`` int64 [B] (None: all), for the rows ``rows`` (None:
        all).

        With config.context "full" they are the whole source so far, and take the place of all that came before.
        """
        if not states.shape[1]:
            return
        which = range(len(self.waiting)) if rows is None else rows
        counts = torch.full((len(states),), states.shape[1]) if lengths is None else lengths.to("cpu")
        if self.model.config.context == "full":
            self._forget_source(which)
        for row, new, n in zip(which, states, counts.tolist(), strict=True):
            self.waiting[row] = torch.cat([self.waiting[row], new[:n]])
        self.available = self.available.index_add(0, torch.tensor(which), counts)

    def finish(self, *, rows: Sequence[int] | None = None) -> None:
        """No more states will come for ``rows`` (None: all): what waited for them may be written."""
        which = range(len(self.waiting)) if rows is None else rows
        self.finished = self.finished.index_fill(0, torch.tensor(which, dtype=torch.int64), True)

    def can_write(self) -> Tensor:
        """bool [B]: WRITE (True) or READ, by wait-k; plain arithmetic that touches no state."""
        needs = wait_k_needs(self.k, self.written, self.model.config.pre_decision)
        return self.finished | (self.available >= needs)

    @torch.no_grad()
    def step(self, tokens: Tensor, *, see: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the next token of every row after ``tokens`` int64 [B], those written last (at first
        bos_token_id).

        see: int64 [B], how many source states to look at, at least as many as before; None: g(i) = min((k + i) r, S). A
        policy
            other than wait-k gives ``available``.

        Raises ValueError, before anything is touched, where a row has to READ first; SequenceTooLong past cosFormer's
        maximum.
        """
        if see is None:
            may, needs = self.can_write(), wait_k_needs(self.k, self.written, self.model.config.pre_decision)
            see = torch.as_tensor(needs)
        else:
            may = self.finished | (self.available >= see.to("cpu"))
        assert see is not None
        if not bool(may.all()):
            row = int((~may).nonzero()[0])
            raise ValueError(
                f"DecoderStream.step: expected {int(see[row])} source states or a finished source in row {row}, "
                f"found {int(self.available[row])} (READ first)"
            )
        check_target_length(int(self.written.max()) + 1, self.model.config)
        self.absorb(torch.maximum(torch.minimum(see.to("cpu"), self.available), self.seen))
        decoder, device = self.model.decoder, self.own[0].length.device
        positions = self.written.to(device)[:, None]
        x = decoder.embed(tokens.to(device)[:, None], positions)
        masses: list[Tensor | None] = []
        chunk = self.model.config.pre_decision if self.keep_mass else None
        for number, block in enumerate(decoder.layers):
            own, cross = self.own[number], self.cross[number]
            x, self.own[number], mass = block.step(x, own, cross, position_ids=positions, mass_of=chunk)
            masses.append(mass)
        self.mass = torch.stack([mass for mass in masses if mass is not None], dim=1) if self.keep_mass else None
        self.written = self.written + 1
        return self.model.lm_head(decoder.norm(x))[:, 0]

    @torch.no_grad()
    def absorb(self, upto: Tensor | None = None) -> None:
        """Put the states from ``seen`` up to ``upto`` int64 [B] (None: all that are available) into the sums.

        A step does it by itself; a policy that looks ahead does it before it takes the snapshot that it goes back to,
        so that what it has looked at does not pile up.
        """
        upto = self.available if upto is None else upto
        counts = upto - self.seen
        longest = int(counts.max()) if len(counts) else 0
        if not longest:
            return
        rows = counts.tolist()
        context = pad_sequence([row[:n] for row, n in zip(self.waiting, rows, strict=True)], batch_first=True)
        self.waiting = [row[n:].clone() for row, n in zip(self.waiting, rows, strict=True)]
        mask = None
        if min(rows) < longest:
            mask = (torch.arange(longest) < counts[:, None]).to(context.device)
        first = self.seen.to(context.device)
        chunk = self.model.config.pre_decision
        for block, cross in zip(self.model.decoder.layers, self.cross, strict=True):
            _over_source(block).absorb(context, cross, first=first, key_mask=mask, chunk=chunk)
        self.seen = upto

    def _forget_source(self, rows: Sequence[int]) -> None:
        """Back to a source of which nothing was seen; the target stays."""
        if len(rows) < len(self.waiting):
            index = torch.tensor(rows)
            part = self.reorder(index)
            part._forget_source(range(len(rows)))
            return self.put(index, part)
        none = self.waiting[0].new_zeros(len(self.waiting), 0, self.model.config.hidden_size)
        for number, (block, cross) in enumerate(zip(self.model.decoder.layers, self.cross, strict=True)):
            empty = _over_source(block).empty_state(none, keep_mass=self.keep_mass)
            self.cross[number] = replace(empty, length=cross.length, conv=cross.conv)  # the target's
        self.seen = torch.zeros_like(self.seen)
        self.available = torch.zeros_like(self.available)
        self.waiting = list(none)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: with linear attention the same after any number of tokens, but for
        ``keep_mass``.
        """
        counts = [self.k, self.written, self.available, self.seen, self.finished]
        states = sum(state.nbytes for state in (*self.own, *self.cross))
        return states + _nbytes([*counts, *self.waiting])

    def reorder(self, index: Tensor) -> DecoderStream:
        """A stream of its own whose row b goes on from row index[b] of this one (beams); ``index`` int64 of any
        length.
        """
        here, rows = index.to(self.own[0].length.device), index.to("cpu")
        return replace(
            self,
            **{name: getattr(self, name).index_select(0, rows) for name in COUNTS},
            own=[state.take(here) for state in self.own],
            cross=[state.take(here) for state in self.cross],
            waiting=[self.waiting[row] for row in rows.tolist()],
            mass=None if self.mass is None else self.mass.index_select(0, here),
        )

    def snapshot(self) -> DecoderStream:
        """An independent copy, to go back to."""
        return self.reorder(torch.arange(len(self.written)))

    def restore(self, snapshot: DecoderStream) -> None:
        """Go back to ``snapshot``, which stays usable."""
        _take_over(self, snapshot.snapshot())

    @staticmethod
    def join(streams: Sequence[DecoderStream]) -> DecoderStream:
        """One stream with the rows of several, wherever each of them is; ``mass`` comes with the next step.

        Raises ValueError where only some keep the mass.
        """
        if len({stream.keep_mass for stream in streams}) > 1:
            raise ValueError("DecoderStream.join: expected the same keep_mass in all streams, found both")
        return replace(
            streams[0],
            **{name: torch.cat([getattr(stream, name) for stream in streams]) for name in COUNTS},
            own=[LayerState.join(layer) for layer in zip(*(stream.own for stream in streams), strict=True)],
            cross=[LayerState.join(layer) for layer in zip(*(stream.cross for stream in streams), strict=True)],
            waiting=[row for stream in streams for row in stream.waiting],
            mass=None,
        )

    def put(self, index: Tensor, part: DecoderStream) -> None:
        """Row b of ``part`` takes the place of row index[b]: what was taken out by ``reorder``, and has gone on, goes
        back.
        """
        here, rows = index.to(self.own[0].length.device), index.to("cpu")
        for name in COUNTS:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(part, name)))
        for own, new in zip([*self.own, *self.cross], [*part.own, *part.cross], strict=True):
            own.put(here, new)
        for row, waiting in zip(rows.tolist(), part.waiting, strict=True):
            self.waiting[row] = waiting
        self.mass = None

    def split(self) -> list[DecoderStream]:
        """Each row as a stream of its own."""
        return [self.reorder(torch.tensor([row])) for row in range(len(self.written))]


COUNTS = ("k", "written", "available", "seen", "finished")


@torch.no_grad()
def greedy_translation(
    model: LeapformerForConditionalGeneration,
    source: SourceStates,
    *,
    k: int | Tensor | None = None,
    max_tokens: int = 200,
) -> list[list[int]]:
    """The most likely token at every step, for whole utterances (`model.encode`): what a stream with this k would
    write.

    Returns for each row its tokens, without the end of sentence; at most ``max_tokens``.
    """
    hidden, mask = source
    stream = DecoderStream.begin(model, len(hidden), k=k)
    stream.feed(hidden, None if mask is None else mask.sum(1))
    stream.finish()
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert config.bos_token_id is not None
    written: list[list[int]] = [[] for _ in range(len(hidden))]
    rows, tokens = torch.arange(len(hidden)), torch.full((len(hidden),), config.bos_token_id)
    for _ in range(max_tokens):
        tokens = stream.step(tokens).argmax(-1).to("cpu")
        goes_on = ~torch.isin(tokens, torch.tensor([end for end in ends if end is not None]))
        for row, token, real in zip(rows.tolist(), tokens.tolist(), goes_on.tolist(), strict=True):
            if real:
                written[row].append(token)
        if not bool(goes_on.any()):
            break
        if not bool(goes_on.all()):  # sentences that have ended are computed no further
            kept = goes_on.nonzero()[:, 0]
            stream, rows, tokens = stream.reorder(kept), rows[kept], tokens[kept]
    return written


def _over_source(block: DecoderBlock) -> AttentionLayer:
    assert block.cross_attention is not None
    return block.cross_attention


def _check_evaluation(model: LeapformerForConditionalGeneration) -> None:
    if model.training:
        raise ValueError(
            "stream: expected a model in evaluation mode (dropout would change its states), found training"
        )


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _take_over(stream: EncoderStream | DecoderStream, other: EncoderStream | DecoderStream) -> None:
    for field in fields(stream):
        setattr(stream, field.name, getattr(other, field.name))
