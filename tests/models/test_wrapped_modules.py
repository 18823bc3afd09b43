"""Modules that something is wrapped around are called, so that what their weights really are is used."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from leapformer.models import DecoderStream, EncoderStream, LeapformerForMaskedLM, greedy_translation
from leapformer.nn import LeapModule, RandomFeatures
from leapformer.nn.plain import home_of, is_plain
from tests.models.builders import SETTINGS, tiny_config, tiny_model, tokens
from tests.models.translation_builders import speech, tiny_translator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*offload.*"),
    # PEFT reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
ADAPTIVE = {"adaptive_cutoffs": [10, 20], "adaptive_factor": 2}
MODELS = {name: SETTINGS[name] for name in ("leap-paper", "leap-gated", "leap-grouped", "performer", "softmax-conv")}
MODELS["adaptive"] = ADAPTIVE
models = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def leaps(model):
    return [module for module in model.modules() if isinstance(module, LeapModule)]


def check(model, expected, ids):
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-10, rtol=1e-10)
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.tolist() == expected.generate(ids, max_new_tokens=4, do_sample=False).tolist()


@models
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_fetched(fields, where, tmp_path):
    model, ids = tiny_model(**fields), tokens(2, 6)
    expected = copy.deepcopy(model)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True)
    assert next(model.parameters()).is_meta
    check(model, expected, ids)


def test_the_encoder_of_the_classifier_is_offloaded_too():
    torch.manual_seed(0)
    model, ids = LeapformerForMaskedLM(tiny_config(pooling="cls", variant="gated")).double().eval(), tokens(2, 6)
    expected = copy.deepcopy(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"variant": "gated", "cross_attention": "softmax"}], ids=["leap", "gated"])
def test_an_offloaded_translation_streams(fields):
    model = tiny_translator(**fields)
    expected, features = copy.deepcopy(model), speech(1, 40)
    cpu_offload(model, execution_device=torch.device("cpu"))

    def streamed(translator):
        encoder, decoder = EncoderStream.begin(translator), DecoderStream.begin(translator, k=1)
        states = [encoder.push(features[:, :25]), encoder.push(features[:, 25:]), encoder.finish()]
        for new in states:
            decoder.feed(new)
        return torch.cat([*states, decoder.step(torch.tensor([1]))[None, :, : states[0].shape[2]]], 1)

    torch.testing.assert_close(streamed(model), streamed(expected), atol=1e-10, rtol=1e-10)
    source = expected.encode(features)
    assert greedy_translation(model, source, max_tokens=5) == greedy_translation(expected, source, max_tokens=5)


def test_a_convolution_of_the_front_end_that_is_wrapped_streams_alike():
    model, features = tiny_translator(), speech(1, 22)
    conv = model.encoder.subsampling.convs[0]
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    whole, front = model.encoder.subsampling(features), model.encoder.subsampling
    cache, found = front.empty_cache(1), []
    for start, end in ((0, 3), (3, 4), (4, 15), (15, 22)):
        states, cache = front.push(features[:, start:end], cache)
        found.append(states)
    torch.testing.assert_close(torch.cat([*found, front.finish(cache)], 1), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fields", [SETTINGS["leap-paper"], SETTINGS["leap-grouped"]], ids=["shared", "per-head"])
def test_parametrised_leap_weights_are_used(fields):
    model, ids = tiny_model(**fields), tokens(2, 6)
    expected = copy.deepcopy(model)
    for module, plain in zip(leaps(model), leaps(expected), strict=True):
        parametrize.register_parametrization(module, "w2", Doubled())
        with torch.no_grad():
            plain.w2.mul_(2)
    check(model, expected, ids)


def test_pruned_and_normed_leap_weights_are_used():
    model, ids = tiny_model(), tokens(2, 6)
    expected = copy.deepcopy(model)
    for number, (module, plain) in enumerate(zip(leaps(model), leaps(expected), strict=True)):
        if number % 2:
            parametrizations.weight_norm(module, "w2")
            with torch.no_grad():
                module.parametrizations.w2.original0.mul_(3)
                plain.w2.mul_(3)
        else:
            prune.l1_unstructured(module, "w2", amount=2)
            with torch.no_grad():
                module.w2_orig.mul_(3)  # the masked weight is made anew before each call
                plain.w2.mul_(3).mul_(module.w2_mask)
    check(model, expected, ids)


def test_lora_on_leap_parameters_is_used():
    from peft import LoraConfig, get_peft_model

    model, ids = tiny_model(), tokens(2, 6)
    expected = model(ids).logits
    names = ["q_proportion.w2", "k_proportion.w2"]
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    )
    wrapped = wrapped.double()
    found = wrapped(ids).logits
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(wrapped.merge_and_unload()(ids).logits, found, atol=1e-10, rtol=1e-10)


def wrap_forward(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


WRAPPERS = {
    "forward hook": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "forward of the instance": wrap_forward,
    "parametrisation": lambda module: parametrize.register_parametrization(module, "w2", nn.Identity()),
    "pruning": lambda module: prune.identity(module, "w2"),
    "subclass": lambda module: setattr(module, "__class__", type("Other", (LeapModule,), {})),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_what_is_wrapped_around_a_module_is_seen(wrap):
    module = LeapModule(4)
    assert is_plain(module, LeapModule)
    wrap(module)
    assert not is_plain(module, LeapModule)


def test_hooks_of_all_modules_are_seen():
    module, seen = LeapModule(4), []
    handle = nn.modules.module.register_module_forward_hook(lambda found, *_: seen.append(type(found).__name__))
    try:
        assert not is_plain(module, LeapModule)
        tiny_model()(tokens(1, 3))
    finally:
        handle.remove()
    assert is_plain(module, LeapModule) and seen.count("LeapModule") == 4


def test_every_module_with_weights_is_called_or_plain():
    """A hook on any module with weights of its own fires: nothing is read past it."""
    for fields in (*SETTINGS.values(), ADAPTIVE):
        model, called = tiny_model(**fields), set()
        owners = {
            name: m
            for name, m in model.named_modules()
            if list(m.parameters(recurse=False)) or isinstance(m, RandomFeatures)
        }
        for name, module in owners.items():
            module.register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        model(tokens(1, 5), labels=tokens(1, 5))
        assert called == set(owners)


def test_where_an_offloaded_module_works():
    model = tiny_model()
    assert home_of(model.model.norm) == {"dtype": torch.float64, "device": torch.device("cpu")}
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert home_of(model.model.norm)["device"] == torch.device("cpu")
