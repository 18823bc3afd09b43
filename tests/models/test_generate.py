"""`generate()`: greedy, sampling, beams, padded batches, chunked prefill, and the pipeline."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, pipeline

from tests.models.builders import SETTINGS, tiny_model, tokens

settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
FEW = {
    name: SETTINGS[name] for name in ("leap-paper", "leap-gated", "cosformer-paper", "softmax-paper", "hybrid-gated")
}
few_settings = pytest.mark.parametrize("fields", FEW.values(), ids=FEW.keys())


def test_greedy_is_the_argmax_of_the_full_forward_for_200_tokens():
    for fields in ({}, {"variant": "gated"}):
        # Untied, so that it does not settle on repeating one token.
        model, prompt = tiny_model(tie_word_embeddings=False, **fields), tokens(1, 5)
        found = model.generate(prompt, max_new_tokens=200, do_sample=False)
        best = model(found).logits.argmax(-1)
        assert found[0, 5:].tolist() == best[0, 4:-1].tolist()
        assert len(set(found[0].tolist())) > 5


@settings
def test_a_left_padded_batch_is_each_row_alone(fields):
    model = tiny_model(**fields)
    prompts = [tokens(1, length, seed=length) for length in (3, 8, 5)]
    alone = [model.generate(prompt, max_new_tokens=12, do_sample=False)[0, -12:].tolist() for prompt in prompts]
    ids = torch.cat([F.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([F.pad(torch.ones_like(prompt), (8 - prompt.shape[1], 0)) for prompt in prompts])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert together[:, -12:].tolist() == alone


@few_settings
def test_chunked_prefill_and_no_cache_give_the_same(fields):
    model, ids = tiny_model(**fields), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **wanted).tolist()
    assert model.generate(ids, prefill_chunk_size=4, **wanted).tolist() == expected
    assert model.generate(ids, use_cache=False, **wanted).tolist() == expected


@few_settings
def test_beams_equal_beams_without_a_cache(fields):
    model, ids = tiny_model(**fields), tokens(2, 6)
    wanted = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False, "num_return_sequences": 2, "pad_token_id": 0}
    assert model.generate(ids, **wanted).tolist() == model.generate(ids, use_cache=False, **wanted).tolist()


def test_sampling_follows_the_seed_and_the_cache_can_be_continued():
    model, ids = tiny_model(), tokens(2, 6)
    samples = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            samples.append(model.generate(ids, max_new_tokens=8, do_sample=True, top_k=9, temperature=1.3).tolist())
    assert samples[0] == samples[1]

    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    half = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=4, do_sample=False)
    assert rest.tolist() == whole.tolist()


def test_generation_from_embeddings_and_of_an_ending_row():
    model, ids = tiny_model(), tokens(2, 6)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False).tolist() == whole[:, 6:].tolist()
    end = int(whole[0, 8])
    ended = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert ended[0, 6:].tolist() == whole[0, 6 : 6 + whole[0, 6:].tolist().index(end) + 1].tolist() + [0] * (
        ended.shape[1] - 6 - whole[0, 6:].tolist().index(end) - 1
    )


def test_a_foreign_cache_implementation_is_refused():
    with pytest.raises(ValueError, match="expected no cache_implementation"):
        tiny_model().generate(tokens(1, 3), max_new_tokens=2, cache_implementation="static")


def test_the_text_generation_pipeline():
    words = {word: place for place, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", " "])}
    inner = Tokenizer(models.WordLevel(words, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    run = pipeline("text-generation", model=tiny_model(dtype=torch.float32), tokenizer=tokenizer)
    found = run(["abc", "hello you"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert [row[0]["generated_text"].startswith("a") for row in found] == [True, False]
