"""The translation model in parallel form: wait-k attention, causality, padding, losses, gradients, checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from leapformer.models import CheckpointError, SequenceTooLong
from leapformer.models.translation import (
    CosformerCrossAttention,
    LeapformerForConditionalGeneration,
    smoothed_losses,
    wait_k_visibility,
)
from leapformer.models.translation_configuration import LeapformerTranslationConfig
from leapformer.ops import LinearState, Staircase, linear_attention, linear_state
from tests.models.translation_builders import CHUNK, FEATURES, MAXIMA, SETTINGS, speech, targets, tiny_translator

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())


# ---- the attention ---------------------------------------------------------------------------------------------------


def random_source(T: int, S: int, seed: int):
    """q, k, v and proportions of 3 utterances and 2 heads, and their lengths S, S - 1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(3, n, 2, 4, dtype=torch.float64, generator=generator) for n in (T, S))
    v = torch.randn(3, S, 2, 5, dtype=torch.float64, generator=generator)
    p_q, p_k = (torch.rand(3, n, 2, dtype=torch.float64, generator=generator) for n in (T, S))
    return q, k, v, p_q, p_k, [S, max(S - 1, 1), 1]


def quadratic(q, k, v, p_q, p_k, lengths, waits, ratio):
    """The formula, one weight at a time over all keys: g(i) = min((k + i) r, length)."""
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, length in enumerate(lengths):
        for i in range(q.shape[1]):
            seen = length if waits[b] is None else min((waits[b] + i) * ratio, length)
            angle = math.pi / 2 * (p_q[b, i] - p_k[b, :seen])  # [seen, H]
            weight = (q[b, i] * k[b, :seen]).sum(-1) * angle.cos()
            output[b, i] = (weight[..., None] * v[b, :seen]).sum(0) / weight.sum(0)[:, None]
    return output


def factors(p):
    return torch.stack([(math.pi / 2 * p).cos(), (math.pi / 2 * p).sin()], -1)


@pytest.mark.parametrize("ratio", [1, 3, 7])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 30), (20, 7), (70, 65)])
@pytest.mark.parametrize("waits", [(1, 1, 1), (3, 1, 5), (9, None, 2)])
def test_quadratic_blocked_and_prefix_states_are_one_attention(T, S, ratio, waits):
    q, k, v, p_q, p_k, lengths = random_source(T, S, seed=T + S + ratio)
    expected = quadratic(q, k, v, p_q, p_k, lengths, waits, ratio)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    visible = wait_k_visibility(torch.tensor([k or 0 for k in waits]), ratio, S)
    blocked = linear_attention(q, k, v, factors(p_q), factors(p_k), visible=visible, key_mask=mask).output
    torch.testing.assert_close(blocked, expected, atol=1e-10, rtol=1e-10)

    chunks = linear_state(k, v, factors(p_k), key_mask=mask, every=ratio)
    last = chunks.kv.shape[1] - 1
    for i in range(T):
        at = [last if wait is None else min(wait + i - 1, last) for wait in waits]
        rows = torch.arange(3)
        state = LinearState(chunks.kv[rows, at], chunks.z[rows, at])
        now = linear_attention(
            q[:, i : i + 1], k[:, :0], v[:, :0], factors(p_q[:, i : i + 1]), factors(p_k[:, :0]), initial_state=state
        ).output
        torch.testing.assert_close(now[:, 0], expected[:, i], atol=1e-10, rtol=1e-10)


def test_the_visibility_of_wait_k():
    assert wait_k_visibility(None, 3, 10) == "all"
    assert wait_k_visibility(2, 3, 10) == Staircase(6, 3)
    counts = wait_k_visibility(torch.tensor([1, 0, 3]), 3, 10).counts(3, 10)
    assert counts.tolist() == [[3, 6, 9], [10, 10, 10], [9, 10, 10]]
    with pytest.raises(ValueError, match="k: expected at least 1 chunk, or None for the whole source, found 0"):
        wait_k_visibility(0, 3, 10)


def test_cosformer_counts_source_and_target_up_to_maxima_of_their_own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = CosformerCrossAttention(8, 2, max_positions=5, max_source_positions=9).double()
        x, context = torch.randn(1, 4, 8).double(), torch.randn(1, 7, 8).double()
    q, k, v = (
        proj(y).view(1, -1, 2, 4) for proj, y in ((layer.q_proj, x), (layer.k_proj, context), (layer.v_proj, context))
    )
    angle = math.pi / 2 * ((torch.arange(4) + 1)[:, None] / 5 - (torch.arange(7) + 1) / 9)
    weights = torch.einsum("bthk,bshk->bhts", q.relu(), k.relu()) * angle.cos()
    heads = torch.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), v)
    y, _ = layer(x, context, position_ids=torch.arange(4)[None])
    torch.testing.assert_close(y, layer.o_proj(heads.flatten(2)), atol=1e-6, rtol=1e-6)


# ---- the model -------------------------------------------------------------------------------------------------------


@settings
@pytest.mark.parametrize("k", [1, 3, None])
def test_what_is_not_yet_read_changes_nothing_at_all(fields, k):
    model, x, labels = tiny_translator(**fields), speech(1, 100), targets(1, 9)
    logits = model(x, labels=labels, k=k).logits
    for i in (0, 4, 7):
        seen = 25 if k is None else min((k + i) * CHUNK, 25)
        other = x.clone()
        other[:, 4 * seen :] = speech(1, 100 - 4 * seen, seed=5)
        changed = model(other, labels=labels, k=k).logits
        assert torch.equal(changed[:, : i + 1], logits[:, : i + 1])
        if seen + CHUNK <= 25:
            assert not torch.equal(changed[:, i + 1], logits[:, i + 1])
        more = labels.clone()
        more[:, i:] = targets(1, 9 - i, seed=6)
        assert torch.equal(model(x, labels=more, k=k).logits[:, : i + 1], logits[:, : i + 1])


@settings
@pytest.mark.parametrize("context", ["chunk", "full"])
def test_a_padded_batch_is_each_utterance_alone(fields, context):
    model, x, labels = tiny_translator(context=context, **fields), speech(4, 90), targets(4, 9)
    frames, tokens, waits = (90, 61, 24, 2), (9, 4, 7, 1), torch.tensor([2, 5, 0, 1])
    mask = (torch.arange(90) < torch.tensor(frames)[:, None]).long()
    labels = labels.masked_fill(torch.arange(9) >= torch.tensor(tokens)[:, None], -100)
    x = x.masked_fill(mask[..., None] == 0, 77)
    together = model(x, mask, labels, k=waits)
    losses = 0.0
    for row, (n, t) in enumerate(zip(frames, tokens, strict=True)):
        wait = int(waits[row]) or None
        alone = model(x[row : row + 1, :n], labels=labels[row : row + 1, :t], k=wait)
        torch.testing.assert_close(together.logits[row, :t], alone.logits[0], atol=1e-10, rtol=1e-10)
        losses = losses + alone.loss * t
    torch.testing.assert_close(together.loss, losses / sum(tokens), atol=1e-10, rtol=1e-10)


def test_a_text_source():
    model = tiny_translator(source="text", source_vocab_size=31, pre_decision=1)
    ids, labels = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0)), targets(2, 5)
    logits = model(input_ids=ids, labels=labels, k=2).logits
    other = ids.clone()
    other[:, 4:] = 0
    changed = model(input_ids=other, labels=labels, k=2).logits
    assert torch.equal(changed[:, :3], logits[:, :3]) and not torch.equal(changed[:, 3], logits[:, 3])
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    padded = model(input_ids=ids, attention_mask=mask, labels=labels, k=2).logits
    alone = model(input_ids=ids[1:, :7], labels=labels[1:], k=2).logits
    torch.testing.assert_close(padded[1:], alone, atol=1e-10, rtol=1e-10)


@settings
def test_every_weight_learns(fields):
    model = tiny_translator(ctc_weight=0.3, hidden_dropout=0.1, attention_dropout=0.1, **fields).train()
    mask = (torch.arange(100) < torch.tensor([[100], [70]])).long()
    model(speech(2, 100), mask, targets(2, 6), k=2).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fields", [{}, {"cross_attention": "softmax"}])
def test_gradient_checkpointing_gives_the_same_gradients(fields):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_translator(**fields).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(speech(2, 50), labels=targets(2, 6), k=2).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=1e-12)


def test_a_small_model_learns_to_tell_what_was_said():
    torch.manual_seed(0)
    model = tiny_translator(dtype=torch.float32, initializer_range=0.1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    words = speech(4, 12, seed=9, dtype=torch.float32)  # each word is a chunk of frames
    losses = []
    for step in range(130):
        said = torch.randint(4, (16, 6), generator=torch.Generator().manual_seed(step))
        output = model(words[said].flatten(1, 2), labels=said + 3, k=1)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.nll))
    assert losses[0] > 2 and losses[-1] < 0.9  # without the source: log 4 = 1.39


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_that_of_torch():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100, -100], [6, 0, 1, 2, 3]])
    smoothed, nll = smoothed_losses(logits, labels, 0.1)
    for found, smoothing in ((smoothed, 0.1), (nll, 0.0)):
        expected = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(found, expected)
    assert smoothed_losses(logits.bfloat16(), labels, 0.1)[0].dtype == torch.float32


def test_the_ctc_loss_is_that_of_torch():
    model, x = tiny_translator(ctc_weight=0.5, ctc_vocab_size=11), speech(2, 40)
    mask = (torch.arange(40) < torch.tensor([[40], [29]])).long()
    labels, spoken = targets(2, 5), torch.tensor([[3, 3, 7], [10, -100, -100]])
    output = model(x, mask, labels, ctc_labels=spoken)
    total = 0.0
    for row, (n, said) in enumerate(((40, [3, 3, 7]), (29, [10]))):
        states = model.encode(x[row : row + 1, :n])
        log_p = F.log_softmax(model.ctc_head(states.hidden), -1).transpose(0, 1)
        total = total + F.ctc_loss(
            log_p,
            torch.tensor([said]),
            torch.tensor([len(log_p)]),
            torch.tensor([len(said)]),
            blank=11,
            reduction="sum",
        )
    torch.testing.assert_close(output.ctc_loss, total / 10)
    plain = model(x, mask, labels, ctc_labels=spoken)
    smoothed = smoothed_losses(plain.logits, labels, 0.1)[0].mean()
    torch.testing.assert_close(output.loss, smoothed + 0.5 * total / 10)


def test_ctc_takes_the_labels_without_the_end_and_forgives_an_utterance_that_is_too_short():
    model, x = tiny_translator(ctc_weight=1.0), speech(1, 40)
    ended = torch.tensor([[5, 6, 7, 2, -100]])
    alone = model(x, labels=ended).ctc_loss
    torch.testing.assert_close(alone, model(x, labels=ended, ctc_labels=torch.tensor([[5, 6, 7]])).ctc_loss)
    assert alone > 0
    assert model(x[:, :4], labels=ended).ctc_loss == 0


def test_the_loss_is_shared_out_over_the_items_of_an_accumulated_batch():
    model, x, labels = tiny_translator(ctc_weight=0.3), speech(3, 40), targets(3, 6)
    labels[1, 3:] = -100
    whole = model(x, labels=labels, k=2).loss
    parts = [model(x[r : r + 1], labels=labels[r : r + 1], k=2, num_items_in_batch=15).loss for r in range(3)]
    torch.testing.assert_close(whole, sum(parts))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@settings
def test_a_saved_model_is_the_same_model(tmp_path, fields):
    model, x = tiny_translator(ctc_weight=0.1, **fields), speech(2, 40)
    model.save_pretrained(tmp_path)
    again = LeapformerForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.lm_head.weight is again.decoder.embed_tokens.weight
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded), name
    labels = targets(2, 4)
    assert torch.equal(again(x, labels=labels, k=1).logits, model(x, labels=labels, k=1).logits)


def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(tmp_path):
    tiny_translator().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_layers": 3}))
    with pytest.raises(CheckpointError, match="found [0-9]+ missing"):
        LeapformerForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "leapformer"}))
    with pytest.raises(CheckpointError, match="expected model_type 'leapformer_translation', found 'leapformer'"):
        LeapformerForConditionalGeneration.from_pretrained(tmp_path)


def test_an_encoder_is_handed_over(tmp_path):
    transcriber = tiny_translator(seed=3, ctc_weight=0.3, vocab_size=19, decoder_layers=1, decoder_attention="softmax")
    transcriber.save_pretrained(tmp_path)
    model, x = tiny_translator(), speech(1, 40)
    before = model.decoder.norm.weight.clone(), model.lm_head.weight.clone()
    model.load_encoder(tmp_path)
    assert torch.equal(model.encode(x).hidden, transcriber.encode(x).hidden)
    assert torch.equal(model.decoder.norm.weight, before[0]) and torch.equal(model.lm_head.weight, before[1])
    with pytest.raises(CheckpointError, match=r"expected encoder_attention='softmax', found 'leap'"):
        tiny_translator(encoder_attention="softmax").load_encoder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected a config.json, found none"):
        model.load_encoder(tmp_path / "empty")


# ---- start and errors ------------------------------------------------------------------------------------------------


def test_states_of_unit_variance_enter_the_first_block():
    model = LeapformerForConditionalGeneration(LeapformerTranslationConfig(encoder_layers=1, decoder_layers=1))
    states, _ = model.encoder.embed(torch.randn(2, 400, 80))
    assert 0.5 < states.std().item() < 1.5


def test_the_paper_s_leap_module_and_sizes():
    config = LeapformerTranslationConfig()
    assert (config.head_dim, config.leap_hidden, config.encoder_layers, config.decoder_layers) == (32, 8, 12, 6)
    with torch.device("meta"):
        model = LeapformerForConditionalGeneration(config)
    assert model.num_parameters_added_by_leap() == 2 * (12 + 6 + 6) * (8 * 34 + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "sign"}, "config source: expected one of speech, text, found 'sign'"),
        ({"context": "none"}, "config context: expected one of chunk, full, found 'none'"),
        (
            {"cross_attention": "performer"},
            "config cross_attention: expected one of leap, cosformer, linear, softmax, found 'performer'",
        ),
        (
            {"encoder_attention": "cosformer"},
            "config max_source_positions: expected a number, since encoder_attention='cosformer' needs the length",
        ),
        (
            {"cross_attention": "cosformer", "max_source_positions": 9},
            "config max_target_positions: expected a number, since cross_attention='cosformer' needs the length",
        ),
        ({"pre_decision": 0}, "config pre_decision: expected at least 1, found 0"),
        ({"hidden_size": 17}, "config hidden_size: expected an even number, found 17"),
        (
            {"hidden_size": 18, "num_attention_heads": 4},
            "config hidden_size: expected a multiple of num_attention_heads=4",
        ),
        ({"num_key_value_heads": 3}, "config num_key_value_heads: expected a divisor of num_attention_heads=2"),
        ({"label_smoothing": 1.0}, "config label_smoothing: expected a number from 0 to below 1, found 1.0"),
        ({"ctc_weight": -1.0}, "config ctc_weight: expected at least 0, found -1.0"),
        ({"bos_token_id": 99}, "config bos_token_id: expected an id below vocab_size=23, found 99"),
        ({"variant": "best"}, "config variant: expected one of paper, gated, found 'best'"),
    ],
)
def test_what_is_wrong_with_a_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_translator(**fields)


def test_wrong_input_is_one_clear_line():
    model, x, labels = tiny_translator(), speech(2, 20), targets(2, 3)
    with pytest.raises(ValueError, match="expected labels or decoder_input_ids, found neither"):
        model(x)
    with pytest.raises(ValueError, match=r"expected input_features \(config.source is 'speech'\), found none"):
        model(input_ids=labels, labels=labels)
    with pytest.raises(ValueError, match="found both input_features and input_ids"):
        model(x, input_ids=labels, labels=labels)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[2, 20\], found \[2, 5\]"):
        model(x, torch.ones(2, 5), labels)
    with pytest.raises(ValueError, match="attention_mask: expected padding on the right only, found it elsewhere"):
        model(x, (torch.arange(20) > torch.tensor([[-1], [3]])).long(), labels)
    with pytest.raises(ValueError, match=rf"features: expected shape \[batch, frames, {FEATURES}\]"):
        model(x[..., :3], labels=labels)
    with pytest.raises(ValueError, match="expected a CTC head, found config.ctc_weight = 0"):
        model.ctc_log_probs(model.encode(x))


def test_cosformer_refuses_what_is_longer_than_its_maxima():
    model = tiny_translator(cross_attention="cosformer", **MAXIMA)
    model(speech(1, 160), labels=targets(1, 30))
    with pytest.raises(SequenceTooLong, match="source states: expected at most max_source_positions=40, found 41"):
        model(speech(1, 161), labels=targets(1, 30))
    with pytest.raises(SequenceTooLong, match="target tokens: expected at most max_target_positions=30, found 31"):
        model(speech(1, 160), labels=targets(1, 31))
