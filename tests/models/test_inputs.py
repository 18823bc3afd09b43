"""What callers hand to `forward`: packing told in several ways, masks, flags of the configuration, and what passes
by.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from leapformer.models import (
    LeapformerCache,
    LeapformerEncoder,
    LeapformerForMaskedLM,
    LeapformerForSequenceClassification,
)
from tests.models.builders import SETTINGS, tiny_config, tiny_model, tokens
from tests.models.translation_builders import speech, targets, tiny_translator

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def alone(model, rows):
    return torch.cat([model(row[None]).logits for row in rows], dim=1)


def ints(text):
    return torch.tensor([[int(letter) for letter in row] for row in text.split()])


ROWS = [tokens(n, seed=n) for n in (7, 5, 1, 3)]
TOLD = {
    "position_ids": {"position_ids": torch.cat([torch.arange(len(row)) for row in ROWS])[None]},
    "attention_mask": {"attention_mask": ints("1111111222223444")},
    "a mask of floats": {"attention_mask": ints("1111111222223444").float()},
    "seq_idx": {"seq_idx": ints("0000000111112333").int()},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 7, 12, 13, 16])},
    "flash attention": {
        "cu_seq_lens_q": torch.tensor([0, 7, 12, 13, 16], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 7, 12, 13, 16], dtype=torch.int32),
        "max_length_q": 7,
        "max_length_k": 7,
    },
}
TOLD["all of them"] = {**TOLD["position_ids"], **TOLD["seq_idx"], **TOLD["flash attention"]}


@settings
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
def test_packing_is_understood_however_it_is_told(fields, told):
    model = tiny_model(**fields)
    output = model(torch.cat(ROWS)[None], **told)
    close(output.logits, alone(model, ROWS))
    assert output.past_key_values is None


@settings
def test_packing_with_padding(fields):
    model = tiny_model(**fields)
    ids, mask = torch.zeros(1, 20, dtype=torch.int64), ints("00111111100222223444")
    mask[0, 5], mask[0, 11] = 0, 0
    real = [row[:n] for row, n in zip(ROWS, (6, 4, 1, 3), strict=True)]
    ids[mask != 0] = torch.cat(real)
    found = model(ids, attention_mask=mask).logits[mask != 0]
    close(found, alone(model, real)[0])
    beside = model(ids, attention_mask=(mask != 0).long(), cu_seqlens=torch.tensor([0, 9, 16, 17, 20]))
    close(beside.logits[mask != 0], found)


@settings
def test_several_rows_may_each_be_packed(fields):
    model = tiny_model(**fields)
    first, second = torch.cat([ROWS[0], ROWS[3]]), torch.cat([ROWS[1], ROWS[1]])
    ids = torch.stack([first, second])
    expected = torch.cat([alone(model, [ROWS[0], ROWS[3]]), alone(model, [ROWS[1], ROWS[1]])])
    positions = torch.tensor([[*range(7), *range(3)], [*range(5), *range(5)]])
    for told in (
        {"position_ids": positions},
        {"attention_mask": ints("1111111222 1111122222")},
        {"seq_idx": ints("0000000111 2222233333")},
    ):
        output = model(ids, labels=ids, output_hidden_states=True, **told)
        close(output.logits, expected)
        assert [state.shape for state in output.hidden_states] == [(2, 10, 16)] * 3


def test_random_packings_and_paddings_of_models():
    generator = torch.Generator().manual_seed(11)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    names = list(SETTINGS)
    for case in range(40):
        model = tiny_model(**SETTINGS[names[draw(len(names))]] | ({"conv_width": 2 + draw(4)} if draw(2) else {}))
        rows = [tokens(1 + draw(6), seed=100 * case + n) for n in range(1 + draw(4))]
        numbers = torch.cat([torch.full((len(row),), n + 1) for n, row in enumerate(rows)])
        places = torch.randperm(len(numbers) + draw(6), generator=generator)[: len(numbers)].sort().values
        mask = torch.zeros(1, int(places.max()) + 1 + draw(2), dtype=torch.int64)
        ids = mask.clone()
        mask[0, places], ids[0, places] = numbers, torch.cat(rows)
        close(model(ids, attention_mask=mask).logits[0, places], alone(model, rows)[0])


@settings
def test_a_later_turn_padded_anywhere_goes_on_from_the_cache(fields):
    model, ids = tiny_model(**fields), tokens(2, 12)
    expected = model(ids).logits
    cache = model(F.pad(ids[:, :4], (2, 0)), attention_mask=ints("001111 001111")).past_key_values
    second = torch.tensor([[0, *ids[0, 4:7], 0], [ids[1, 4], 0, ids[1, 5], 0, ids[1, 6]]])
    mask = ints("00111101110 00111110101")
    found = model(second, attention_mask=mask, past_key_values=cache).logits[mask[:, 6:] != 0].view(2, 3, -1)
    close(found, expected[:, 4:7])
    close(model(ids[:, 7:], past_key_values=cache).logits, expected[:, 7:])


@pytest.mark.parametrize("kind", ["leap", "softmax", "cosformer", "nystromformer", "reformer", "bigbird", "informer"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_of_an_encoder_may_lie_anywhere(kind, pooling):
    torch.manual_seed(0)
    fields = {"attention": kind, "pooling": pooling, "conv_width": 4, "attention_block": 4, "attention_features": 8}
    model = LeapformerForSequenceClassification(tiny_config(**fields)).double().eval()
    ids = tokens(1, 7)
    expected = model(ids).logits
    for mask in ("0011111110", "1101101100100", "1111111000", "0001111111"):
        padded = torch.zeros(1, len(mask), dtype=torch.int64)
        padded[ints(mask) != 0] = ids[0]
        close(model(padded, attention_mask=ints(mask)).logits, expected)


def test_generation_is_never_taken_for_packing():
    model = tiny_model(pad_token_id=0)
    ids, mask = F.pad(tokens(2, 5), (3, 0)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3], mask[1, :5] = 0, 0
    expected = [
        model.generate(row[None, int(8 - m.sum()) :], max_new_tokens=5, do_sample=False)
        for row, m in zip(ids, mask, strict=True)
    ]
    for keywords in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 2}):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **keywords)
        if "num_beams" not in keywords:
            assert [row[-5:].tolist() for row in found] == [row[0, -5:].tolist() for row in expected]
    cache = LeapformerCache(2)
    close(
        model(ids, position_ids=torch.arange(8)[None] + 3, past_key_values=cache).logits,
        model(ids, position_ids=torch.arange(8)[None] + 3).logits,
    )


REFUSED = {
    "two rows": ({"cu_seqlens": torch.tensor([0, 3, 6])}, "model with cu_seqlens: expected a batch of 1"),
    "two rows of flash attention": ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "expected a batch of 1"),
    "keys otherwise": (
        {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])},
        "cu_seq_lens_k: expected cu_seq_lens_q and the same bounds",
    ),
    "keys alone": ({"cu_seq_lens_k": torch.tensor([0, 6])}, "cu_seq_lens_k: expected cu_seq_lens_q"),
    "two bounds": (
        {"cu_seqlens": torch.tensor([0, 6]), "cu_seq_lens_q": torch.tensor([0, 3, 6])},
        "cu_seq_lens_q: expected the bounds of cu_seqlens, found others",
    ),
    "numbers that fall": (
        {"attention_mask": ints("112211 111111")},
        "attention_mask: expected 1 = real and 0 = padding",
    ),
    "halves": ({"attention_mask": torch.full((2, 6), 0.5)}, "attention_mask: expected 1 = real"),
    "below 0": ({"attention_mask": -ints("111111 111111")}, "attention_mask: expected 1 = real"),
    "NaN": ({"attention_mask": torch.full((2, 6), torch.nan)}, "attention_mask: expected 1 = real"),
    "restart beside a mask": (
        {"attention_mask": ints("111111 011111"), "position_ids": ints("012012 001234")},
        "position_ids: expected rising numbers beside an attention_mask, found a restart",
    ),
    "restart beside a cache": (
        {"past_key_values": LeapformerCache(2), "position_ids": ints("012012")},
        "position_ids: expected rising numbers beside a cache, found a restart",
    ),
    "numbers beside a cache": (
        {"past_key_values": LeapformerCache(2), "attention_mask": ints("111222 111111")},
        "past_key_values: expected none beside packed sequences",
    ),
    "a cache of packed ones": (
        {"use_cache": True, "position_ids": ints("012012")},
        "use_cache: expected False with packed",
    ),
    "seq_idx of another shape": ({"seq_idx": ints("000")}, r"seq_idx: expected \[2, 6\], found \[1, 3\]"),
    "positions of another shape": (
        {"position_ids": ints("012")},
        r"position_ids: expected \[1 or 2, 6\], found \[1, 3\]",
    ),
    "attentions": ({"output_attentions": True}, "LeapformerModel: expected output_attentions=False"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_ambiguous_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model()(tokens(2, 6), **arguments)
    assert "\n" not in str(caught.value)


def test_one_sequence_is_not_packed():
    model, ids = tiny_model(), tokens(2, 6)
    for told in (
        {"position_ids": torch.arange(6)[None]},
        {"attention_mask": ints("222222 000011").clamp(max=2)},
        {"seq_idx": ints("000000 111111")},
    ):
        assert model(ids, **told).past_key_values is not None


def test_a_compiled_graph_looks_at_no_values():
    model, ids = tiny_model(variant="gated", num_hidden_layers=1), tokens(2, 9)
    told = {"attention_mask": ints("001111111 111111100"), "position_ids": torch.arange(9)[None]}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids, **told).loss, model(ids, labels=ids, **told).loss)
    torch.compiler.reset()


def models():
    torch.manual_seed(0)
    yield tiny_model(dtype=torch.float32), {"input_ids": tokens(2, 5)}, "hidden_states", 3
    yield LeapformerEncoder(tiny_config(pooling="cls")), {"input_ids": tokens(2, 5)}, "hidden_states", 3
    yield LeapformerForMaskedLM(tiny_config()), {"input_ids": tokens(2, 5)}, "hidden_states", 3
    yield LeapformerForSequenceClassification(tiny_config()), {"input_ids": tokens(2, 5)}, "hidden_states", 3
    translated = {"input_features": speech(2, 12, dtype=torch.float32), "labels": targets(2, 4)}
    yield tiny_translator(dtype=torch.float32), translated, "decoder_hidden_states", 3


def test_every_model_honours_its_configuration_and_takes_what_passes_by():
    for model, inputs, states, count in models():
        plain = model(**inputs)
        assert plain.get(states) is None
        passing = {"cache_position": torch.arange(5), "task_ids": None, "tokenizer": object(), "adapter_names": ["a"]}
        again = model(**inputs, **passing, output_attentions=False)
        torch.testing.assert_close(again[0], plain[0])
        model.config.output_hidden_states = True
        assert len(model(**inputs)[states]) == count
        assert model(**inputs, output_hidden_states=False).get(states) is None
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple)
        assert not isinstance(model(**inputs, return_dict=True), tuple)
        model.config.return_dict = True
        with pytest.raises(TypeError, match="unexpected keyword 'atention_mask'"):
            model(**inputs, atention_mask=torch.ones(2, 5))
        with pytest.raises(ValueError, match="expected output_attentions=False"):
            model(**inputs, output_attentions=True)
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="expected output_attentions=False"):
            model(**inputs)


def test_an_encoder_packs_nothing():
    for model in (LeapformerEncoder(tiny_config()), LeapformerForMaskedLM(tiny_config())):
        with pytest.raises(ValueError, match="an encoder packs nothing"):
            model(tokens(1, 4), attention_mask=ints("1122"))
    with pytest.raises(ValueError, match="nothing is packed here"):
        tiny_translator()(speech(1, 4), ints("1122"), labels=targets(1, 3))
