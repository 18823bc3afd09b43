"""The simultaneous translation model step by step: an encoder stream and a decoder stream, at the level of features and tokens.

    encoder, decoder = EncoderStream.begin(model), DecoderStream.begin(model, k=3)
    decoder.feed(encoder.push(frames))          # the states of the chunks that these frames complete
    while decoder.can_write().all(): ...        # READ or WRITE, before anything is touched
        logits = decoder.step(token)            # the token written last; at first bos_token_id
    decoder.feed(encoder.finish()); decoder.finish()

Both give what the parallel form gives, and both keep a state of constant size where attention is linear. A stream holds one or
several utterances as rows; ``reorder`` picks rows, ``join`` puts streams together, so many independent utterances make one
batch for a step.

Letters: B rows (utterances), n states or chunks that are new, S states, D hidden size, L layers, H query heads, G key/value
heads, R rank of the re-weighting, K head width, M chunks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from leapformer.models.translation import (
    CosformerCrossAttention,
    LeapformerForConditionalGeneration,
    SourceStates,
    check_target_length,
)
from leapformer.nn import DecoderBlock, LayerState, LinearAttention
from leapformer.nn.attention import AttentionLayer
from leapformer.nn.plain import home_of
from leapformer.nn.subsampling import SubsamplingCache
from leapformer.ops import LinearState, linear_state

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
            states=[] if full else [empty_state(block.attention, none) for block in encoder.blocks],  # type: ignore[arg-type]
            prefix=none if full else None,
        )

    @torch.no_grad()
    def push(self, source: Tensor) -> Tensor:
        """The encoder states [B, n, D] of all chunks that are complete with these features [B, F, num_features] or ids [B, F].

        With context "full" they are those of all chunks so far, encoded anew, wherever a chunk was completed; push no more than
        one chunk at a time where earlier tokens must not know of later ones.

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
        """The states [B, n, D] that were waiting for a chunk to be complete (context "full": all, encoded anew, if any did)."""
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
        """Bytes of all that is kept: the same at the end of every chunk, unless attention is softmax or context full."""
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
            states=[_pick(state, here) for state in self.states],
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
            states=[join_states(layer) for layer in zip(*(stream.states for stream in streams), strict=True)],
            prefix=torch.cat(prefixes) if prefixes else None,
        )

    def put(self, index: Tensor, part: EncoderStream) -> None:
        """Row b of ``part`` takes the place of row index[b]: what was taken out by ``reorder``, and has gone on, goes back.

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
            _put_state(own, here, new)

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

    Of the source it keeps sums over the states seen so far, S and z of every cross-attention (softmax: their keys and values),
    and the states that no token may see yet. All counts are int64 [B] on the CPU:

    Attributes:
        model: whose decoder runs, in evaluation mode.
        k: chunks to be read before the first token (``WHOLE_SOURCE``: all); may be changed between steps.
        written: tokens so far. available: source states fed so far. seen: those that are in the sums.
        finished: bool [B], whether the source has ended.
        own, cross: states of self-attention and cross-attention of every block.
        waiting: for each row, states [., D] that were fed and not seen.
        chunk_keys: for every block [B, M, G, R, K], the sum of the key features of every chunk, where ``keep_mass`` asked for it.
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
    chunk_keys: list[Tensor] | None = None
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
        keep_mass: keep what ``mass`` needs, for policies that look at the attention (2 K floats per chunk, head and layer).

        Raises ValueError for an integer below 1, and for a model in training mode.
        """
        _check_evaluation(model)
        if isinstance(k, int) and k < 1:
            raise ValueError(f"k: expected at least 1 chunk, or None for the whole source, found {k}")
        k = torch.full((batch,), WHOLE_SOURCE if k is None else k) if not isinstance(k, Tensor) else k.to("cpu")
        none = torch.zeros(batch, 0, model.config.hidden_size, **home_of(model.decoder.norm))
        blocks = _blocks(model)
        cross = [empty_state(block.cross_attention, none) for block in blocks if block.cross_attention is not None]
        sums = [state.linear.z for state in cross if state.linear is not None]
        return cls(
            model=model,
            k=torch.where(k < 1, WHOLE_SOURCE, k).to(torch.int64).expand(batch).clone(),
            written=torch.zeros(batch, dtype=torch.int64),
            available=torch.zeros(batch, dtype=torch.int64),
            seen=torch.zeros(batch, dtype=torch.int64),
            finished=torch.zeros(batch, dtype=torch.bool),
            own=[empty_state(block.attention, none) for block in blocks],
            cross=cross,
            waiting=list(none),
            keep_mass=keep_mass,
            chunk_keys=[z[:, None][:, :0] for z in sums] if keep_mass and sums else None,
        )

    def feed(self, states: Tensor, lengths: Tensor | None = None, *, rows: Sequence[int] | None = None) -> None:
        """More encoder states [B, n, D], real up to ``lengths`` int64 [B] (None: all), for the rows ``rows`` (None: all).

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
        """Logits [B, V] of the next token of every row after ``tokens`` int64 [B], those written last (at first bos_token_id).

        see: int64 [B], how many source states to look at, at least as many as before; None: g(i) = min((k + i) r, S). A policy
            other than wait-k gives ``available``.

        Raises ValueError, before anything is touched, where a row has to READ first; SequenceTooLong past cosFormer's maximum.
        """
        if see is None:
            may, see = self.can_write(), wait_k_needs(self.k, self.written, self.model.config.pre_decision)  # type: ignore[assignment]
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
        masses: list[Tensor] = []
        for number in range(len(self.own)):
            x = self._run_block(number, x, positions, masses)
        self.mass = torch.stack(masses, dim=1) if masses else None
        self.written = self.written + 1
        return self.model.lm_head(decoder.norm(x))[:, 0]

    def _run_block(self, number: int, x: Tensor, positions: Tensor, masses: list[Tensor]) -> Tensor:
        """x [B, 1, D] through one block, as `DecoderBlock.forward` does it, with the source behind a state."""
        block = _blocks(self.model)[number]
        assert block.cross_attention is not None and block.cross_norm is not None
        y, own = block.attention(
            block.attention_norm(x), visible="causal", position_ids=positions, state=self.own[number], return_state=True
        )
        assert own is not None
        self.own[number] = own
        x = x + y
        y, cross = block.cross_norm(x), self.cross[number]
        if self.keep_mass:
            keys = None if self.chunk_keys is None else self.chunk_keys[number]
            masses.append(_chunk_mass(block.cross_attention, y, cross, keys, positions, self.model.config.pre_decision))
        x = x + _read(block.cross_attention, y, cross, positions)
        return x + block.feed_forward(block.feed_forward_norm(x))

    @torch.no_grad()
    def absorb(self, upto: Tensor | None = None) -> None:
        """Put the states from ``seen`` up to ``upto`` int64 [B] (None: all that are available) into the sums.

        A step does it by itself; a policy that looks ahead does it before it takes the snapshot that it goes back to, so that
        what it has looked at does not pile up.
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
        for number, block in enumerate(_blocks(self.model)):
            layer, cross = block.cross_attention, self.cross[number]
            if isinstance(layer, LinearAttention):
                k, factors = _key_features(layer, context, first)
                v = _heads(layer, layer.v_proj(context))
                cross.linear = linear_state(k, v, factors, key_mask=mask, initial_state=cross.linear)
                if self.chunk_keys is not None:
                    ratio = self.model.config.pre_decision
                    self.chunk_keys[number] = _add_to_chunks(self.chunk_keys[number], k, factors, mask, first, ratio)
            else:
                assert layer is not None
                _append_keys(layer, cross, context, mask)
        self.seen = upto

    def _forget_source(self, rows: Sequence[int]) -> None:
        """Back to a source of which nothing was seen; the target stays."""
        if len(rows) < len(self.waiting):
            index = torch.tensor(rows)
            part = self.reorder(index)
            part._forget_source(range(len(rows)))
            return self.put(index, part)
        none = self.waiting[0].new_zeros(len(self.waiting), 0, self.model.config.hidden_size)
        for block, cross in zip(_blocks(self.model), self.cross, strict=True):
            assert block.cross_attention is not None
            empty = empty_state(block.cross_attention, none)
            cross.linear, cross.keys, cross.values, cross.key_mask = empty.linear, empty.keys, empty.values, None
        if self.chunk_keys is not None:
            self.chunk_keys = [keys[:, :0] for keys in self.chunk_keys]
        self.seen = torch.zeros_like(self.seen)
        self.available = torch.zeros_like(self.available)
        self.waiting = list(none)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: with linear attention the same after any number of tokens, but for ``keep_mass``."""
        counts = [self.k, self.written, self.available, self.seen, self.finished]
        states = sum(state.nbytes for state in (*self.own, *self.cross))
        return states + _nbytes([*counts, *self.waiting, *(self.chunk_keys or [])])

    def reorder(self, index: Tensor) -> DecoderStream:
        """A stream of its own whose row b goes on from row index[b] of this one (beams); ``index`` int64 of any length."""
        here, rows = index.to(self.own[0].length.device), index.to("cpu")
        return replace(
            self,
            **{name: getattr(self, name).index_select(0, rows) for name in COUNTS},
            own=[_pick(state, here) for state in self.own],
            cross=[_pick(state, here) for state in self.cross],
            waiting=[self.waiting[row] for row in rows.tolist()],
            chunk_keys=None if self.chunk_keys is None else [keys.index_select(0, here) for keys in self.chunk_keys],
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
            own=[join_states(layer) for layer in zip(*(stream.own for stream in streams), strict=True)],
            cross=[join_states(layer) for layer in zip(*(stream.cross for stream in streams), strict=True)],
            waiting=[row for stream in streams for row in stream.waiting],
            chunk_keys=_join_chunk_keys(streams),
            mass=None,
        )

    def put(self, index: Tensor, part: DecoderStream) -> None:
        """Row b of ``part`` takes the place of row index[b]: what was taken out by ``reorder``, and has gone on, goes back."""
        here, rows = index.to(self.own[0].length.device), index.to("cpu")
        for name in COUNTS:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(part, name)))
        for own, new in zip([*self.own, *self.cross], [*part.own, *part.cross], strict=True):
            _put_state(own, here, new)
        for row, waiting in zip(rows.tolist(), part.waiting, strict=True):
            self.waiting[row] = waiting
        if self.chunk_keys is not None and part.chunk_keys is not None:
            for number, pair in enumerate(zip(self.chunk_keys, part.chunk_keys, strict=True)):
                own, new = _padded_to_the_longest(pair)
                self.chunk_keys[number] = own.index_copy(0, here, new)
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
    """The most likely token at every step, for whole utterances (`model.encode`): what a stream with this k would write.

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


# ---- states of layers ------------------------------------------------------------------------------------------------


def empty_state(layer: AttentionLayer, none: Tensor) -> LayerState:
    """The state of a layer that has seen nothing, for the B rows of ``none`` [B, 0, D]."""
    B, heads, width = len(none), layer.num_kv_heads, layer.head_dim
    state = LayerState(length=torch.zeros(B, dtype=torch.int64, device=none.device))
    if layer.conv is not None:
        state.conv = none.new_zeros(B, layer.conv.width - 1, none.shape[2])
    if isinstance(layer, LinearAttention):
        plain = layer.q_proportion is None and layer.position_proportion is None
        decay_heads = None if layer.decay is None else layer.num_heads
        state.linear = LinearState.zeros(
            B, decay_heads or heads, 1 if plain else layer.reweighting.rank, width, width,
            dtype=torch.promote_types(none.dtype, torch.float32), device=none.device, decay_heads=decay_heads,
        )  # fmt: skip
    else:
        state.keys, state.values = (none.new_zeros(B, 0, heads, width) for _ in range(2))
    return state


def join_states(states: Sequence[LayerState]) -> LayerState:
    """The rows of several states of one layer behind one another; softmax: shorter rows get masked keys."""
    linear = [state.linear for state in states if state.linear is not None]
    joined = LayerState(length=torch.cat([state.length for state in states]))
    if linear:
        decays = [state.log_decay for state in linear if state.log_decay is not None]
        joined.linear = LinearState(
            torch.cat([state.kv for state in linear]),
            torch.cat([state.z for state in linear]),
            torch.cat(decays) if decays else None,
        )
    else:
        joined.keys, joined.values, joined.key_mask = _join_keys(states)
    tails = [state.conv for state in states if state.conv is not None]
    joined.conv = torch.cat(tails) if tails else None
    return joined


def _join_keys(states: Sequence[LayerState]) -> tuple[Tensor, Tensor, Tensor | None]:
    keys, values, masks = _aligned(states)
    mask = torch.cat(masks)
    return torch.cat(keys), torch.cat(values), None if bool(mask.all()) else mask


def _aligned(states: Sequence[LayerState]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Keys, values and masks of each state, with masked slots up to the number of the longest."""
    keys = [state.keys for state in states if state.keys is not None]
    values = [state.values for state in states if state.values is not None]
    slots = max(k.shape[1] for k in keys)

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, slots - x.shape[1]])

    masks = [
        padded(k.new_ones(k.shape[:2], dtype=torch.bool) if state.key_mask is None else state.key_mask)
        for k, state in zip(keys, states, strict=True)
    ]
    return [*map(padded, keys)], [*map(padded, values)], masks


def _pick(state: LayerState, index: Tensor) -> LayerState:
    """Rows of a state, without the masked keys that the company of longer ones gave them."""
    state = state.reorder(index)
    _compact(state)
    return state


def _put_state(state: LayerState, index: Tensor, part: LayerState) -> None:
    """Row b of ``part`` takes the place of row index[b]; at fixed addresses, except for softmax's keys."""
    state.length.index_copy_(0, index, part.length)
    if state.conv is not None and part.conv is not None:
        state.conv.index_copy_(0, index, part.conv)
    if state.linear is not None and part.linear is not None:
        for own, new in zip(state.linear, part.linear, strict=True):
            if own is not None and new is not None:
                own.index_copy_(0, index, new)
    elif state.keys is not None:
        (own_keys, new_keys), (own_values, new_values), (own_mask, new_mask) = _aligned([state, part])
        state.keys = own_keys.index_copy(0, index, new_keys)
        state.values = own_values.index_copy(0, index, new_values)
        state.key_mask = own_mask.index_copy(0, index, new_mask)
        _compact(state)


def _compact(state: LayerState) -> None:
    """Softmax: as many slots as the row with the most real keys has, and no mask where all have as many."""
    if state.key_mask is None or state.keys is None or state.values is None:
        return
    most = int(state.key_mask.sum(1).max()) if len(state.key_mask) else 0
    if most < state.key_mask.shape[1]:
        order = state.key_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        state.keys, state.values = (
            x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:])) for x in (state.keys, state.values)
        )
        state.key_mask = state.key_mask.gather(1, order)
    if bool(state.key_mask.all()):
        state.key_mask = None


# ---- cross-attention over a source that comes in pieces --------------------------------------------------------------


def _read(layer: AttentionLayer, x: Tensor, cross: LayerState, positions: Tensor) -> Tensor:
    """Cross-attention of x [B, 1, D] over all that ``cross`` has absorbed; the tail of a convolution goes on in ``cross``."""
    none = x.new_zeros(len(x), 0, x.shape[2])
    moves = layer.conv is not None
    y, kept = layer(x, none, position_ids=positions, state=cross, return_state=moves)
    if kept is not None:
        cross.conv = kept.conv
    return y


def _append_keys(layer: AttentionLayer, cross: LayerState, context: Tensor, mask: Tensor | None) -> None:
    """Softmax: keys and values of ``context`` [B, n, D] behind those that are there."""
    assert layer.k_proj is not None and cross.keys is not None and cross.values is not None
    if mask is not None or cross.key_mask is not None:
        shapes = (cross.keys.shape[:2], context.shape[:2])
        found = (cross.key_mask, mask)
        both = [
            torch.ones(shape, dtype=torch.bool, device=context.device) if m is None else m
            for shape, m in zip(shapes, found, strict=True)
        ]
        cross.key_mask = torch.cat(both, dim=1)
    cross.keys = torch.cat([cross.keys, _heads(layer, layer.k_proj(context))], dim=1)
    cross.values = torch.cat([cross.values, _heads(layer, layer.v_proj(context))], dim=1)
    _compact(cross)


def _key_features(layer: LinearAttention, context: Tensor, first: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features [B, n, G, K] and factors [B, n, G or 1, R] of the keys of states that stand from ``first`` [B] on."""
    assert layer.k_proj is not None
    k = layer.feature_map(_heads(layer, layer.k_proj(context)))
    if layer.k_proportion is not None:
        p = layer.k_proportion(k)
    elif isinstance(layer, CosformerCrossAttention):
        # Slots of padding have places too, which may lie beyond the maximum.
        places = first[:, None] + torch.arange(k.shape[1], device=k.device)
        p = layer.source_proportion(places.clamp(max=layer.source_proportion.max_positions - 1))
    else:
        return k, None
    return k, layer.reweighting.factors_k(p.to(torch.promote_types(k.dtype, torch.float32)))


def _query_features(layer: LinearAttention, x: Tensor, positions: Tensor) -> Tensor:
    """phi(q) of x [B, 1, D], [B, H, R, K] in at least float32."""
    q = layer.feature_map(_heads(layer, layer.q_proj(x)))
    dtype = torch.promote_types(q.dtype, torch.float32)
    if layer.q_proportion is not None:
        p = layer.q_proportion(q)
    elif layer.position_proportion is not None:
        p = layer.position_proportion(positions)
    else:
        return q[:, 0, :, None].to(dtype)
    return (q[..., None, :].to(dtype) * layer.reweighting.factors_q(p.to(dtype))[..., None])[:, 0]


def _add_to_chunks(
    keys: Tensor, k: Tensor, factors: Tensor | None, mask: Tensor | None, first: Tensor, ratio: int
) -> Tensor:
    """``keys`` [B, M, G, R, K] with the features of new states added to the chunks that they belong to."""
    B, n = k.shape[:2]
    phi = k[..., None, :].to(keys.dtype)
    if factors is not None:
        phi = phi * factors[..., None]
    chunk = (first[:, None] + torch.arange(n, device=k.device)) // ratio
    if mask is not None:
        phi, chunk = phi.masked_fill(~mask[..., None, None, None], 0), chunk.masked_fill(~mask, 0)
    more = max(int(chunk.max()) + 1 - keys.shape[1], 0)
    rows = torch.arange(B, device=k.device)[:, None].expand(B, n)
    return F.pad(keys, (0, 0, 0, 0, 0, 0, 0, more)).index_put((rows, chunk), phi, accumulate=True)


def _chunk_mass(
    layer: AttentionLayer, x: Tensor, cross: LayerState, keys: Tensor | None, positions: Tensor, ratio: int
) -> Tensor:
    """Each chunk's share of the attention of x [B, 1, D], [B, H, M]: q . z_c / q . z, or softmax's weights summed up."""
    if layer.conv is not None:
        x, _ = layer.conv(x, past=cross.conv)
    if isinstance(layer, LinearAttention):
        assert keys is not None
        phi = _query_features(layer, x, positions)
        mass = torch.einsum("bhrk,bmhrk->bhm", phi, keys.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2))
        return mass / mass.sum(-1, keepdim=True).clamp(min=layer.eps)
    assert cross.keys is not None
    q = _heads(layer, layer.q_proj(x))[:, 0]
    k = cross.keys.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2)
    scores = torch.einsum("bhk,bshk->bhs", q, k) * layer.head_dim**-0.5
    real = torch.ones_like(scores[:, 0], dtype=torch.bool) if cross.key_mask is None else cross.key_mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~real[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)  # a row that has seen nothing
    chunk = (real.long().cumsum(1) - 1).clamp(min=0) // ratio
    chunks = int(chunk.max()) + 1 if chunk.numel() else 0
    return weights.new_zeros(*weights.shape[:2], chunks).scatter_add(2, chunk[:, None].expand_as(weights), weights)


def _heads(layer: AttentionLayer, x: Tensor) -> Tensor:
    """[B, n, G K] -> [B, n, G, K]."""
    return x.unflatten(-1, (-1, layer.head_dim))


def _join_chunk_keys(streams: Sequence[DecoderStream]) -> list[Tensor] | None:
    kept = [stream.chunk_keys for stream in streams if stream.chunk_keys is not None]
    if not kept:
        return None
    return [torch.cat(_padded_to_the_longest(layer)) for layer in zip(*kept, strict=True)]


def _padded_to_the_longest(chunk_keys: Sequence[Tensor]) -> list[Tensor]:
    """Each [B, M, G, R, K] with the same M."""
    most = max(keys.shape[1] for keys in chunk_keys)
    return [F.pad(keys, (0, 0, 0, 0, 0, 0, 0, most - keys.shape[1])) for keys in chunk_keys]


def _blocks(model: LeapformerForConditionalGeneration) -> list[DecoderBlock]:
    return list(model.decoder.blocks)  # type: ignore[arg-type]


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
