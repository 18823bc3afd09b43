"""The translation model step by step = in parallel, for every mechanism, k and size of push; rows, rollback, bytes,
mass.
"""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from leapformer.models import SequenceTooLong
from leapformer.models.translation_stream import DecoderStream, EncoderStream, greedy_translation, wait_k_needs
from tests.models.translation_builders import CHUNK, MAXIMA, SETTINGS, speech, targets, tiny_translator

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
BOS = 1


def pieces(length: int, most: int, seed: int) -> list[slice]:
    """Slices of random sizes from 1 to ``most`` that cover ``length``."""
    generator, cuts = torch.Generator().manual_seed(seed), [0]
    while cuts[-1] < length:
        cuts.append(min(cuts[-1] + int(torch.randint(1, most + 1, (1,), generator=generator)), length))
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def stream_logits(model, x, labels, k, parts, **keywords):
    """Logits [B, T, V] written as soon as wait-k allows it, and how many source states had been read for each token."""
    inputs = model.shift_right(labels)
    encoder, decoder = EncoderStream.begin(model, len(x)), DecoderStream.begin(model, len(x), k=k, **keywords)
    logits, reads = [], []

    def write():
        while len(logits) < labels.shape[1] and decoder.can_write().all():
            reads.append(int(decoder.available[0]))
            logits.append(decoder.step(inputs[:, len(logits)]))

    for part in parts:
        decoder.feed(encoder.push(x[:, part]))
        write()
    decoder.feed(encoder.finish())
    decoder.finish()
    write()
    return torch.stack(logits, 1), reads


@settings
def test_streaming_is_training(fields):
    model, x, labels = tiny_translator(**fields), speech(2, 99), targets(2, 10)
    for k, most in zip((1, 3, 5, 9, None), (1, 60, 17, 1, 5), strict=True):
        expected = model(x, labels=labels, k=k).logits
        logits, reads = stream_logits(model, x, labels, k, pieces(99, most, seed=most))
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        if most == 1:  # no token waits for more than its own g(i)
            assert reads == [min((k + i) * CHUNK, 25) for i in range(10)]


@pytest.mark.parametrize("most", [1, 4, 12, 30, 99])
@pytest.mark.parametrize("k", [1, 3, 5, 9, None])
def test_pushes_of_any_size(k, most):
    model, x, labels = tiny_translator(), speech(1, 99), targets(1, 10)
    logits, _ = stream_logits(model, x, labels, k, pieces(99, most, seed=most))
    torch.testing.assert_close(logits, model(x, labels=labels, k=k).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("frames", [0, 1, 3, 4, 11, 12, 13, 24, 35])
@pytest.mark.parametrize("cross", ["leap", "softmax"])
def test_every_length(frames, cross):
    model, x, labels = tiny_translator(cross_attention=cross), speech(2, frames), targets(2, 5)
    logits, _ = stream_logits(model, x, labels, 2, pieces(frames, 7, 3))
    torch.testing.assert_close(logits, model(x, labels=labels, k=2).logits, atol=1e-9, rtol=1e-9)


def one_rounding(model, x, labels, k):
    """How far rounding each weight once to float32 moves the exact logits of a token: [B, T, 1], largest of four draws.

    A denominator close to 0, as with three source states of which a query likes none, makes float32 that uncertain
    whatever the order of the sums.
    """
    exact, generator = model.double(), torch.Generator().manual_seed(0)
    expected, moved = exact(x.double(), labels=labels, k=k).logits, []
    for _ in range(4):
        weights = {
            name: value * (1 + 2**-24 * (2 * torch.rand(value.shape, dtype=value.dtype, generator=generator) - 1))
            for name, value in exact.named_parameters()
        }
        logits = torch.func.functional_call(exact, weights, (x.double(),), {"labels": labels, "k": k}).logits
        moved.append((logits - expected).abs().amax(-1, keepdim=True))
    return torch.stack(moved).amax(0)


@settings
@torch.no_grad()
def test_streaming_is_training_in_float32(fields):
    model, x, labels = (
        tiny_translator(dtype=torch.float32, **fields),
        speech(2, 99, dtype=torch.float32),
        targets(2, 10),
    )
    for k in (1, None):
        logits, _ = stream_logits(model, x, labels, k, pieces(99, 40, 0))
        difference = (logits - model(x, labels=labels, k=k).logits).abs()
        # Two forms, each with the rounding of its weights and of what it computes from them: four times one rounding.
        rounding = one_rounding(deepcopy(model), x, labels, k)
        assert rounding.median() < 1e-6  # so that 1e-5 is what most tokens are held to
        assert (difference <= (4 * rounding).clamp(min=1e-5)).all(), (difference / rounding).max()


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_text_source(ratio):
    model = tiny_translator(source="text", source_vocab_size=31, pre_decision=ratio)
    ids, labels = torch.randint(31, (2, 14), generator=torch.Generator().manual_seed(0)), targets(2, 8)
    for k in (1, 3, None):
        logits, _ = stream_logits(model, ids, labels, k, pieces(14, 3, 0))
        expected = model(input_ids=ids, labels=labels, k=k).logits
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


@settings
def test_what_comes_later_changes_nothing_at_all(fields):
    model, x, labels = tiny_translator(**fields), speech(1, 99), targets(1, 10)
    other = torch.cat([x[:, :48], speech(1, 51, seed=8)], 1)
    logits, changed = (stream_logits(model, y, labels, 2, pieces(99, 5, 4))[0] for y in (x, other))
    assert torch.equal(logits[:, :3], changed[:, :3])  # the third token sees (2 + 2) 3 = 12 states, of 48 frames
    assert not torch.equal(logits[:, 3], changed[:, 3])


# ---- full context ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leap", "softmax"])
def test_full_context_encodes_anew_at_every_read(kind):
    model = tiny_translator(context="full", encoder_attention=kind, cross_attention=kind)
    x, labels = speech(1, 75), targets(1, 6)
    encoder, decoder = EncoderStream.begin(model), DecoderStream.begin(model, k=1, keep_mass=True)
    for start in range(0, 75, 4 * CHUNK):
        states = encoder.push(x[:, start : start + 4 * CHUNK])
        if start + 4 * CHUNK <= 75:
            prefix = x[:, : start + 4 * CHUNK]
            torch.testing.assert_close(states, model.encode(prefix).hidden, atol=1e-12, rtol=1e-12)
        decoder.feed(states)
        if start == 0:
            first = decoder.step(torch.tensor([BOS]))
            torch.testing.assert_close(first, model(prefix, labels=labels).logits[:, 0], atol=1e-10, rtol=1e-10)
        elif start == 24:
            decoder.step(labels[:, 0])
            assert decoder.mass.shape[3] == 2 and decoder.seen.tolist() == [6]
    last = encoder.finish()
    torch.testing.assert_close(last, model.encode(x).hidden, atol=1e-12, rtol=1e-12)
    logits, _ = stream_logits(model, x, labels, None, pieces(75, 9, 0))
    torch.testing.assert_close(logits, model(x, labels=labels).logits, atol=1e-9, rtol=1e-9)


# ---- READ or WRITE ---------------------------------------------------------------------------------------------------


def test_it_reads_before_anything_is_touched():
    model = tiny_translator()
    decoder = DecoderStream.begin(model, 2, k=torch.tensor([1, 2]))
    states = model.encode(speech(2, 48)).hidden
    decoder.feed(states[:, :CHUNK])
    assert decoder.can_write().tolist() == [True, False]
    before = decoder.snapshot()
    with pytest.raises(
        ValueError, match=r"expected 6 source states or a finished source in row 1, found 3 \(READ first\)"
    ):
        decoder.step(torch.tensor([BOS, BOS]))
    for own, kept in zip([*decoder.own, *decoder.cross], [*before.own, *before.cross], strict=True):
        assert torch.equal(own.linear.kv, kept.linear.kv) and torch.equal(own.length, kept.length)
    assert decoder.written.tolist() == [0, 0] and decoder.seen.tolist() == [0, 0]
    decoder.feed(states[:, CHUNK:])
    decoder.step(torch.tensor([BOS, BOS]))
    assert decoder.seen.tolist() == [3, 6] and [len(row) for row in decoder.waiting] == [9, 6]
    assert [wait_k_needs(2, written, CHUNK) for written in range(3)] == [6, 9, 12]


def test_another_policy_says_itself_how_much_to_see():
    model, x, labels = tiny_translator(), speech(1, 48), targets(1, 4)
    decoder = DecoderStream.begin(model)
    decoder.feed(model.encode(x).hidden)
    assert not decoder.can_write()
    inputs = model.shift_right(labels)
    logits = torch.stack([decoder.step(inputs[:, i], see=decoder.available) for i in range(4)], 1)
    torch.testing.assert_close(logits, model(x, labels=labels).logits, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="expected 13 source states or a finished source in row 0, found 12"):
        decoder.step(inputs[:, 0], see=torch.tensor([13]))


def test_k_may_change_on_the_way():
    model, x, labels = tiny_translator(), speech(1, 96), targets(1, 4)
    decoder, inputs = DecoderStream.begin(model, k=1), model.shift_right(labels)
    decoder.feed(model.encode(x).hidden)
    decoder.step(inputs[:, 0])
    decoder.k[:] = 4
    decoder.step(inputs[:, 1])
    assert decoder.seen.tolist() == [15]
    decoder.k[:] = 1
    decoder.step(inputs[:, 2])
    assert decoder.seen.tolist() == [15]  # nothing is unseen


def test_wrong_use_is_one_clear_line():
    model = tiny_translator()
    encoder = EncoderStream.begin(model)
    encoder.finish()
    with pytest.raises(ValueError, match="EncoderStream.push: expected an unfinished stream, found a finished one"):
        encoder.push(speech(1, 4))
    with pytest.raises(ValueError, match="k: expected at least 1 chunk, or None for the whole source, found 0"):
        DecoderStream.begin(model, k=0)
    both = [DecoderStream.begin(model, keep_mass=keep) for keep in (True, False)]
    with pytest.raises(ValueError, match="expected the same keep_mass in all streams, found both"):
        DecoderStream.join(both)
    streams = [EncoderStream.begin(model) for _ in range(2)]
    streams[0].push(speech(1, 17))
    with pytest.raises(ValueError, match="EncoderStream.put: expected streams at the end of a chunk, found other ones"):
        streams[1].put(torch.tensor([0]), streams[0])
    with pytest.raises(ValueError, match="expected streams at the same place of a chunk, found different ones"):
        EncoderStream.join(streams)
    for begin in (EncoderStream.begin, DecoderStream.begin):
        with pytest.raises(ValueError, match="expected a model in evaluation mode"):
            begin(tiny_translator().train())


def test_cosformer_refuses_what_is_longer_than_its_maxima():
    fields = {place: "cosformer" for place in ("encoder_attention", "decoder_attention", "cross_attention")}
    model = tiny_translator(**fields, **MAXIMA)
    encoder, decoder = EncoderStream.begin(model), DecoderStream.begin(model)
    with pytest.raises(SequenceTooLong, match="expected at most max_source_positions=40, found 42"):
        for _ in range(14):
            decoder.feed(encoder.push(speech(1, 4 * CHUNK)))
    decoder.finish()
    with pytest.raises(SequenceTooLong, match="expected at most max_target_positions=30, found 31"):
        for _ in range(31):
            decoder.step(torch.tensor([5]))


# ---- rows ------------------------------------------------------------------------------------------------------------


@settings
def test_independent_utterances_step_as_one_batch(fields):
    model = tiny_translator(**fields)
    lengths, arrivals, waits, tokens = (99, 60, 36), (0, 2, 3), (2, 1, 3), (7, 9, 5)
    x, labels = [speech(1, n, seed=n) for n in lengths], [targets(1, t, seed=t) for t in tokens]
    inputs = [model.shift_right(y) for y in labels]
    encoders: list[EncoderStream] = [EncoderStream.begin(model) for _ in x]
    decoders = [DecoderStream.begin(model, k=k, keep_mass=True) for k in waits]
    logits: list[list[torch.Tensor]] = [[] for _ in x]
    size = 4 * CHUNK
    for tick in range(14):
        spans = [(tick - at) * size for at in arrivals]
        reading = [r for r in range(3) if 0 <= spans[r] and spans[r] + size <= lengths[r]]
        if reading:
            together = EncoderStream.join([encoders[r] for r in reading])
            states = together.push(torch.cat([x[r][:, spans[r] : spans[r] + size] for r in reading]))
            for r, stream, new in zip(reading, together.split(), states, strict=True):
                encoders[r] = stream
                decoders[r].feed(new[None])
        for r in range(3):
            if not encoders[r].finished and spans[r] >= 0 and spans[r] + size > lengths[r]:
                encoders[r].push(x[r][:, spans[r] :])
                decoders[r].feed(encoders[r].finish())
                decoders[r].finish()
        while True:
            writing = [r for r in range(3) if decoders[r].can_write() and len(logits[r]) < tokens[r]]
            if not writing:
                break
            together = DecoderStream.join([decoders[r] for r in writing])
            new = together.step(torch.cat([inputs[r][:, len(logits[r])] for r in writing]))
            for r, stream, row in zip(writing, together.split(), new, strict=True):
                decoders[r] = stream
                logits[r].append(row)
    for r in range(3):
        expected = model(x[r], labels=labels[r], k=waits[r]).logits[0]
        torch.testing.assert_close(torch.stack(logits[r]), expected, atol=1e-9, rtol=1e-9)
        shares = decoders[r].mass.sum(-1)  # 0 where ReLU left nothing of a head's query
        assert bool(((shares - 1).abs() < 1e-6).logical_or(shares == 0).all()) and shares.sum() > 1
        if decoders[r].cross[0].keys is not None:  # no padding is left of the company of longer ones
            assert decoders[r].cross[0].keys.shape[1] == int(decoders[r].seen)
            assert decoders[r].cross[0].key_mask is None


@settings
def test_some_rows_step_and_go_back_to_their_places(fields):
    """Rows at different places of their sources and targets; each is what it is alone."""
    model, x, labels = tiny_translator(**fields), speech(3, 72), targets(3, 6)
    inputs, size = model.shift_right(labels), 4 * CHUNK
    expected = model(x, labels=labels, k=1).logits
    encoder, decoder = EncoderStream.begin(model, 3), DecoderStream.begin(model, 3, k=1, keep_mass=True)
    places, logits = [0, 0, 0], [[], [], []]
    for rows in ([0], [2, 0], [1], [0, 1, 2], [2, 1], [0, 2], [1], [1, 0], [1, 2], [0], [2]):
        index = torch.tensor(rows)
        part = encoder.reorder(index)
        states = part.push(torch.cat([x[r : r + 1, places[r] * size : (places[r] + 1) * size] for r in rows]))
        encoder.put(index, part)
        decoder.feed(states, rows=rows)
        assert decoder.available.tolist() == [(places[r] + (r in rows)) * CHUNK for r in range(3)]
        together = decoder.reorder(index)
        new = together.step(torch.stack([inputs[r, places[r]] for r in rows]))
        decoder.put(index, together)
        for r, row in zip(rows, new, strict=True):
            logits[r].append(row)
            places[r] += 1
    assert places == [6, 6, 6] and decoder.written.tolist() == [6, 6, 6]
    torch.testing.assert_close(torch.stack([torch.stack(row) for row in logits]), expected, atol=1e-9, rtol=1e-9)
    decoder.finish(rows=[1])
    assert decoder.finished.tolist() == [False, True, False]
    if decoder.cross[0].keys is not None:  # no slot that is padding in every row
        assert decoder.cross[0].keys.shape[1] == 18 and decoder.cross[0].key_mask is None


def test_full_context_replaces_the_source_of_some_rows():
    model, x, labels = tiny_translator(context="full"), speech(2, 48), targets(2, 2)
    inputs, decoder = model.shift_right(labels), DecoderStream.begin(model, 2, keep_mass=True)
    decoder.feed(model.encode(x[:, :24]).hidden)
    decoder.step(inputs[:, 0], see=decoder.available)
    decoder.feed(model.encode(x[1:]).hidden, rows=[1])
    assert decoder.seen.tolist() == [6, 0] and decoder.available.tolist() == [6, 12]
    one = DecoderStream.begin(model, keep_mass=True)
    one.feed(model.encode(x[1:, :24]).hidden)
    one.step(inputs[1:, 0], see=one.available)
    one.feed(model.encode(x[1:]).hidden)
    expected = one.step(inputs[1:, 1], see=one.available)
    torch.testing.assert_close(decoder.step(inputs[:, 1], see=decoder.available)[1:], expected, atol=1e-9, rtol=1e-9)


@settings
def test_what_is_absorbed_beforehand_changes_nothing(fields):
    model, x, labels = tiny_translator(**fields), speech(2, 48), targets(2, 3)
    inputs, states = model.shift_right(labels), model.encode(x).hidden
    decoders = [DecoderStream.begin(model, 2) for _ in range(2)]
    for decoder in decoders:
        decoder.feed(states)
    decoders[1].absorb(torch.tensor([5, 0]))
    decoders[1].absorb()
    assert [len(row) for row in decoders[1].waiting] == [0, 0] and decoders[1].seen.tolist() == [12, 12]
    for i in range(3):
        first, second = (decoder.step(inputs[:, i], see=decoder.available) for decoder in decoders)
        torch.testing.assert_close(first, second, atol=1e-10, rtol=1e-10)


@settings
def test_snapshot_restore_and_reorder(fields):
    model, x, labels = tiny_translator(**fields), speech(2, 60), targets(2, 8)
    inputs = model.shift_right(labels)
    encoder, decoder = EncoderStream.begin(model, 2), DecoderStream.begin(model, 2, k=1, keep_mass=True)
    decoder.feed(encoder.push(x[:, :41]))
    for i in range(3):
        decoder.step(inputs[:, i])
    kept = encoder.snapshot(), decoder.snapshot()

    def go_on(encoder, decoder, frames, tokens):
        decoder.feed(encoder.push(frames))
        decoder.feed(encoder.finish())
        decoder.finish()
        return torch.stack([decoder.step(tokens[:, i]) for i in range(3, 8)], 1)

    once = go_on(encoder, decoder, x[:, 41:], inputs)
    for _ in range(2):
        encoder.restore(kept[0])
        decoder.restore(kept[1])
        assert not encoder.finished and decoder.written.tolist() == [3, 3]
        assert torch.equal(go_on(encoder, decoder, x[:, 41:], inputs), once)
    index = torch.tensor([1, 1, 0])
    beams = go_on(kept[0].reorder(index), kept[1].reorder(index), x[index, 41:], inputs[index])
    torch.testing.assert_close(beams, once[index], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("variant", ["paper", "gated"])
def test_the_state_does_not_grow(variant):
    model = tiny_translator(variant=variant)
    encoder, decoder = EncoderStream.begin(model, 2), DecoderStream.begin(model, 2, k=1)
    sizes = set()
    for chunk in range(40):
        decoder.feed(encoder.push(speech(2, 4 * CHUNK, seed=chunk)))
        decoder.step(torch.tensor([5, 6]))
        sizes.add((encoder.nbytes, decoder.nbytes))
    assert len(sizes) == 1
    softmax = tiny_translator(cross_attention="softmax", decoder_attention="softmax")
    growing = DecoderStream.begin(softmax, k=1)
    growing.feed(softmax.encode(speech(1, 100)).hidden)
    growing.step(torch.tensor([5]))
    before = growing.cross[0].nbytes, growing.own[0].nbytes
    growing.step(torch.tensor([5]))
    assert growing.cross[0].nbytes == before[0] + 8 * 2 * 16 * CHUNK and growing.own[0].nbytes == before[1] + 8 * 2 * 16


def test_the_bytes_are_those_of_the_sums():
    model = tiny_translator()
    sums = 2 * 2 * (2 * 8 * 8 + 2 * 8) * 8  # layers, heads, cosine and sine of S and z, float64
    encoder, decoder = EncoderStream.begin(model), DecoderStream.begin(model, k=1)
    assert sum(state.linear.nbytes for state in encoder.states) == sums
    assert sum(state.linear.nbytes for state in decoder.own) == sums
    assert sum(state.linear.nbytes for state in decoder.cross) == sums


# ---- attention mass --------------------------------------------------------------------------------------------------


def weights_by_hand(model, x, labels, k, kind):
    """The attention weights [L, H, T, S] of cross-attention in the parallel form, from its queries and keys."""
    kept, hooks = [], []
    for block in model.decoder.blocks:
        layer = block.cross_attention
        for proj in (layer.q_proj, layer.k_proj):
            hooks.append(
                proj.register_forward_hook(lambda module, inputs, output: kept.append(output[0].view(-1, 2, 8)))
            )
    model(x, labels=labels, k=k)
    for hook in hooks:
        hook.remove()
    found = []
    for number, block in enumerate(model.decoder.blocks):
        layer, (q, key) = block.cross_attention, kept[2 * number : 2 * number + 2]
        T, S = len(q), len(key)
        seen = torch.arange(S) < torch.tensor([min((k + i) * CHUNK, S) for i in range(T)])[:, None]
        if kind == "softmax":
            scores = torch.einsum("thk,shk->hts", q, key) / math.sqrt(8)
            found.append(scores.masked_fill(~seen, -math.inf).softmax(-1))
            continue
        q, key = q.relu(), key.relu()
        weight = torch.einsum("thk,shk->hts", q, key)
        if kind == "leap":
            p_q, p_k = layer.q_proportion(q[None])[0].T, layer.k_proportion(key[None])[0].T
            weight = weight * (math.pi / 2 * (p_q[:, :, None] - p_k[:, None])).cos()
        elif kind == "cosformer":
            p_q, p_k = (torch.arange(T) + 1) / 30, (torch.arange(S) + 1) / 40
            weight = weight * (math.pi / 2 * (p_q[:, None] - p_k)).cos()
        weight = weight * seen
        found.append(weight / weight.sum(-1, keepdim=True).clamp(min=1e-6))
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["leap", "linear", "cosformer", "softmax"])
def test_the_mass_of_a_chunk_is_the_sum_of_its_weights(kind):
    model = tiny_translator(cross_attention=kind, **MAXIMA)
    x, labels, k = speech(1, 70), targets(1, 7), 2
    weights = weights_by_hand(model, x, labels, k, kind)
    inputs, decoder = model.shift_right(labels), DecoderStream.begin(model, k=k, keep_mass=True)
    decoder.feed(model.encode(x).hidden)
    decoder.finish()
    for i in range(7):
        decoder.step(inputs[:, i])
        chunks = decoder.mass.shape[3]
        assert chunks == min(k + i, 6)
        parts = weights[:, :, i].split(CHUNK, dim=-1)
        by_chunk = torch.stack([part.sum(-1) for part in parts], -1)
        torch.testing.assert_close(decoder.mass[0], by_chunk[..., :chunks], atol=1e-6, rtol=1e-6)


# ---- whole sentences -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cross", ["leap", "softmax"])
def test_greedy_translation_is_the_most_likely_next_token_of_the_parallel_form(cross):
    model = tiny_translator(seed=4, cross_attention=cross)
    x, lengths, waits = speech(6, 80, seed=3), torch.tensor([80, 33, 52, 17, 80, 64]), torch.tensor([1, 2, 0, 1, 3, 1])
    mask = torch.arange(80) < lengths[:, None]
    states = model.encode(x, mask)
    model.config.eos_token_id = None
    endless = greedy_translation(model, states, k=waits, max_tokens=8)
    assert [len(row) for row in endless] == [8] * 6
    for row, written in enumerate(endless):
        ids, wait = torch.tensor([[BOS, *written]]), int(waits[row]) or None
        logits = model(x[row : row + 1, : lengths[row]], decoder_input_ids=ids[:, :-1], k=wait).logits
        assert torch.equal(logits[0].argmax(-1), ids[0, 1:])
    end = endless[0][5]
    model.config.eos_token_id = [end]
    ended = [row[: row.index(end)] if end in row else row for row in endless]
    assert greedy_translation(model, states, k=waits, max_tokens=8) == ended
