"""Sequence classification: parameters, pooling, pairs, padding, checkpoints, gradients, training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from leapformer.models import LeapformerConfig, LeapformerForSequenceClassification, SequenceTooLong
from leapformer.models.configuration import ATTENTION_KINDS
from tests.models.builders import TINY, tokens

# The small model of Skyformer's harness (arXiv 2111.00035), on the task Text.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "positions": "learned",
    "max_position_embeddings": 4096,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "num_labels": 2,
}
OF_MECHANISMS = {"attention_features": 6, "attention_block": 4, "attention_random_blocks": 1}
kinds = pytest.mark.parametrize("kind", ATTENTION_KINDS)


def tiny_classifier(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields):
    fields = TINY | OF_MECHANISMS | {"num_labels": 3, "max_position_embeddings": 24} | fields
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LeapformerForSequenceClassification(LeapformerConfig(**fields)).to(dtype).eval()


def small_model(**fields):
    with torch.device("meta"):
        return LeapformerForSequenceClassification(LeapformerConfig(**(SMALL | fields)))


def test_the_small_model_has_the_parameters_of_the_paper():
    softmax = small_model(attention="softmax")
    assert softmax.num_parameters() == 370_562
    body = [*softmax.model.blocks.parameters(), *softmax.model.norm.parameters()]
    assert sum(p.numel() for p in body) == 67_072


@pytest.mark.parametrize("r", [1, 8, 32])
def test_leap_adds_4_times_34_r_plus_1(r):
    model = small_model(attention="leap", leap_hidden=r)
    added = 4 * 33 if r == 1 else 4 * (34 * r + 1)
    assert model.num_parameters_added_by_leap() == added == model.num_parameters() - 370_562


@kinds
def test_what_a_mechanism_adds_to_the_small_model(kind):
    added = {
        "leap": 4 * (34 * 8 + 1),
        "linformer": 2 * 2 * 128 * 4096,
        "nystromformer": 2 * 2 * 33,
        "reformer": -2 * (64 * 64 + 64),  # queries are keys
    }
    assert small_model(attention=kind).num_parameters() == 370_562 + added.get(kind, 0)


@kinds
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_padded_batch_is_each_sequence_alone(kind, pooling):
    model = tiny_classifier(attention=kind, pooling=pooling, positions="learned")
    lengths, ids = (24, 13, 5, 1), tokens(4, 24)
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    alone = torch.cat([model(ids[row : row + 1, :n]).logits for row, n in enumerate(lengths)])
    torch.testing.assert_close(model(ids * mask, mask).logits, alone, atol=1e-10, rtol=1e-10)
    left = [F.pad(ids[row, :n], (24 - n, 0)) for row, n in enumerate(lengths)]
    torch.testing.assert_close(model(torch.stack(left), mask.flip(1)).logits, alone, atol=1e-10, rtol=1e-10)


@kinds
def test_a_saved_model_is_the_same_model(tmp_path, kind):
    model, ids = tiny_classifier(attention=kind, pooling="cls", id2label={0: "a", 1: "b", 2: "c"}), tokens(2, 9)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is LeapformerForSequenceClassification and again.config.id2label[1] == "b"
    for (name, saved), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded), name
    assert torch.equal(again(ids).logits, model(ids).logits)


@kinds
def test_every_weight_learns_also_beside_a_sequence_of_padding(kind):
    model = tiny_classifier(attention=kind, hidden_dropout=0.1, attention_dropout=0.1, pooling="cls").train()
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[0], mask[1, 11:] = 0, 0
    for pooling_of_nothing in (model, tiny_classifier(attention=kind)):
        loss = pooling_of_nothing(ids, mask, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        for name, weight in pooling_of_nothing.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name


@kinds
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = tiny_classifier(attention=kind, hidden_dropout=0.1, attention_dropout=0.1).train()
    ids, labels, gradients = tokens(2, 20), torch.tensor([0, 2]), []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-12, rtol=1e-10)


@kinds
def test_some_steps_of_training_lower_the_loss(kind):
    torch.manual_seed(0)
    model = tiny_classifier(attention=kind, dtype=torch.float32, initializer_range=0.02).train()
    ids = tokens(8, 20)
    labels = ids[:, :5].sum(1) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_gated_variant_has_no_decay_that_nothing_uses():
    model, ids, mask = tiny_classifier(variant="gated"), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    model(ids, mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    alone = model(ids[1:, :7]).logits
    torch.testing.assert_close(model(ids, mask).logits[1:], alone, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(ids.roll(5, 1)[1:], mask.roll(5, 1)[1:]).logits, alone, atol=1e-10, rtol=1e-10)


def test_pairs_share_an_encoder_and_may_differ_in_length():
    model = tiny_classifier(paired_inputs=True)
    first, second = tokens(2, 9), tokens(2, 14, seed=2)
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[0, 6:] = 0
    x0, x1 = model.model.pooled(first), model.model.pooled(second, mask)
    expected = model.classifier(torch.cat([x0, x1, x0 * x1, x0 - x1], -1))
    output = model(first, None, second, mask, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, torch.tensor([1, 2])))
    torch.testing.assert_close(
        model(second, mask, first).logits, model(input_ids=second, attention_mask=mask, input_ids_1=first).logits
    )


def test_mean_pooling_is_over_real_tokens():
    model, ids, mask = tiny_classifier(), tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    hidden = model.model(ids, mask).last_hidden_state
    pooled = model.model.pooled(ids, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, :4].mean(0))


def test_cls_has_a_symbol_and_a_place_of_its_own():
    mean, cls = tiny_classifier(positions="learned"), tiny_classifier(positions="learned", pooling="cls")
    assert cls.num_parameters() == mean.num_parameters() + 2 * 16
    ids = tokens(2, 24)  # as long as is allowed
    states = cls.model(ids, output_hidden_states=True)
    assert states.last_hidden_state.shape == (2, 25, 16) and len(states.hidden_states) == 3
    assert torch.equal(cls.model.pooled(ids), states.last_hidden_state[:, 0])


def test_outputs_as_a_tuple():
    model, ids = tiny_classifier(), tokens(2, 7)
    loss, logits = model(ids, labels=torch.tensor([0, 1]), return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 3)
    assert model.model(ids, return_dict=False)[0].shape == (2, 7, 16)


@pytest.mark.parametrize("fields", [{"attention": "cosformer"}, {"attention": "linformer"}, {"positions": "learned"}])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_too_long_a_sequence_is_one_line(fields, pooling):
    model = tiny_classifier(pooling=pooling, **fields)
    with pytest.raises(SequenceTooLong, match="expected at most max_position_embeddings=24 tokens, found 25"):
        model(tokens(1, 25))


@pytest.mark.parametrize(("paired", "found"), [(True, "none"), (False, "one")])
def test_a_second_sequence_where_it_belongs_and_nowhere_else(paired, found):
    model, ids = tiny_classifier(paired_inputs=paired), tokens(1, 5)
    with pytest.raises(ValueError, match=f"with paired_inputs={paired}, found {found}"):
        model(ids, input_ids_1=None if paired else ids)


def test_leap_share_counts_this_model():
    assert small_model(attention="leap", leap_share=132 / 370_562).num_parameters_added_by_leap() == 132
