"""The forward pass: causality, padding, packing, loss, gradients, checkpointing, lengths."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from leapformer.models import LeapformerCache, LeapformerModel, SequenceTooLong
from tests.models.builders import SETTINGS, tiny_config, tiny_model, tokens

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())


@settings
def test_nothing_depends_on_the_future(fields):
    model = tiny_model(**fields)
    embeds = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=embeds).logits[:, 6].square().sum().backward()
    assert (embeds.grad[:, 7:] == 0).all()
    assert (embeds.grad[:, :7] != 0).any(dim=-1).all()


@settings
def test_padding_on_either_side_changes_nothing(fields):
    model = tiny_model(**fields)
    ids = tokens(1, 7)
    expected = model(ids).logits
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = F.pad(ids, (left, right))
        mask = F.pad(torch.ones_like(ids), (left, right))
        found = model(padded, attention_mask=mask).logits[:, left : left + 7]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    # Without a mask, what follows cannot matter.
    torch.testing.assert_close(model(F.pad(ids, (0, 3))).logits[:, :7], expected, atol=1e-10, rtol=1e-10)


@settings
def test_packed_sequences_are_as_if_alone(fields):
    model = tiny_model(**fields)
    first, second = tokens(1, 5), tokens(1, 8, seed=2)
    packed = model(torch.cat([first, second], dim=1), cu_seqlens=torch.tensor([0, 5, 13], dtype=torch.int32)).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=1e-10)


def test_the_loss_is_the_mean_over_shifted_labels():
    model, ids = tiny_model(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 29), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(26)).loss
    torch.testing.assert_close(counted, expected * 13 / 26)
    losses = model.token_losses(ids, labels)
    torch.testing.assert_close(losses.sum() / 13, expected)
    assert output.past_key_values is None
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing == 0


def test_the_loss_of_a_bfloat16_model_is_float32():
    model, ids = tiny_model(dtype=torch.bfloat16), tokens(2, 9)
    output = model(ids, labels=ids)
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16


def test_only_the_wanted_logits_are_computed():
    model, ids = tiny_model(), tokens(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fields", [SETTINGS["leap-gated"], SETTINGS["softmax-paper"]], ids=["leap", "softmax"])
def test_gradient_checkpointing_gives_the_same_gradients(fields, reentrant):
    ids = tokens(2, 10)
    plain, saving = tiny_model(**fields).train(), tiny_model(**fields).train()
    # transformers renamed it; the old name warns in the new versions.
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    plain(ids, labels=ids).loss.backward()
    saving(ids, labels=ids).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "none"])
def test_positions(positions):
    model = tiny_model(positions=positions)
    same = torch.full((1, 6), 3)
    logits = model(same).logits
    assert torch.allclose(logits[:, 1:], logits[:, :1].expand(-1, 5, -1)) == (positions == "none")
    shifted = model(same, position_ids=torch.arange(6)[None] + 4).logits
    assert torch.allclose(shifted, logits) == (positions == "none")


def test_tied_embeddings_are_one_parameter():
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() == tied.num_parameters() + 29 * 16


def test_residual_projections_start_smaller():
    model = LeapformerModel(tiny_config(hidden_size=64, num_hidden_layers=8, initializer_range=0.02))
    named = dict(model.named_parameters())
    wanted = {"inside": 0.02, "residual": 0.02 / 4}
    for name, kind in (
        ("blocks.0.attention.q_proj.weight", "inside"),
        ("blocks.0.attention.o_proj.weight", "residual"),
        ("blocks.3.feed_forward.up_proj.weight", "inside"),
        ("blocks.3.feed_forward.down_proj.weight", "residual"),
    ):
        assert named[name].std().item() == pytest.approx(wanted[kind], rel=0.1), name
    assert named["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "fields", [{}, {"output_gate": "silu", "qk_norm": True, "variant": "gated", "attention_update": "delta"}], ids=str
)
def test_the_share_of_leap_is_kept(fields):
    plain = tiny_model(attention="linear", hidden_size=32, **fields)
    shared = tiny_model(attention="leap", hidden_size=32, leap_share=0.05, **fields)
    added = shared.num_parameters_added_by_leap()
    assert shared.num_parameters() == plain.num_parameters() + added
    assert added / plain.num_parameters() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": "cosformer"}, "cosFormer's proportion"),
        ({"positions": "learned"}, "learned positions exist up to"),
    ],
)
def test_what_is_longer_than_the_maximum_is_refused_with_the_reason(fields, reason):
    model = tiny_model(max_position_embeddings=8, **fields)
    model(tokens(1, 8))
    with pytest.raises(SequenceTooLong, match=f"expected at most max_position_embeddings=8 tokens, found 9; {reason}"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="found 9"):
        model.generate(tokens(1, 6), max_new_tokens=5, do_sample=False)
    # Padding is not length.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    model(tokens(1, 10), attention_mask=mask)


def test_leap_takes_any_length():
    model = tiny_model(max_position_embeddings=8)
    assert model(tokens(1, 40)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected either input_ids or inputs_embeds"),
        (
            {"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 4)},
            r"attention_mask: expected \[2, 3\].*\[2, 4\]",
        ),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}, "attention_mask: expected"),
        ({"input_ids": tokens(2, 3), "past_key_values": LeapformerCache(5)}, "expected a LeapformerCache of 2 layers"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


def test_hidden_states_and_tuples():
    model, ids = tiny_model(), tokens(1, 4)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    logits, *_ = model(ids, return_dict=False)
    torch.testing.assert_close(logits, output.logits)


@pytest.mark.parametrize("name", ["leap-paper", "hybrid-gated"])
def test_compile_gives_the_same_without_a_break(name):
    model, ids = tiny_model(**SETTINGS[name]), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)
    torch.compiler.reset()
