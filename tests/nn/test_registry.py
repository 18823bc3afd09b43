"""The registry of mechanisms: each entry says what its layers are, and nothing else has to know them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from leapformer.models import LeapformerConfig, LeapformerTranslationConfig
from leapformer.models.blocks import SHARED_FIELDS
from leapformer.models.fields import own_fields
from leapformer.nn import (
    KINDS,
    REGISTRY,
    Cosine,
    LeapModule,
    LinearAttention,
    PositionProportion,
    build_attention,
    by_row,
    elu_plus_one,
)
from leapformer.nn.build import Options
from leapformer.nn.layer import AttentionLayer

DOCS = Path(__file__).parents[2] / "docs"
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = {"hidden_size": 16, "num_heads": 4, "max_positions": 32, "num_features": 8}


def arguments_of(layer: type) -> set[str]:
    """What a layer's constructor takes by name, its bases included."""
    found = {name for base in layer.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}
    return found - {"hidden_size", "num_heads"}


@kinds
def test_an_entry_says_what_the_layer_can_do(kind):
    mechanism, layer = REGISTRY[kind], build_attention(kind, **SIZES)
    assert mechanism.name == kind and type(layer) is mechanism.layer
    assert mechanism.capabilities == layer.capabilities


@kinds
def test_an_entry_names_arguments_and_fields_that_there_are(kind):
    mechanism = REGISTRY[kind]
    assert {*mechanism.options, *mechanism.fixed, *mechanism.gated} <= arguments_of(mechanism.layer)
    assert {*SHARED_FIELDS} <= arguments_of(AttentionLayer)
    fields = {*mechanism.options.values(), *SHARED_FIELDS.values()} - {None}
    assert fields <= own_fields(LeapformerConfig).keys()


def test_options_are_all_somebodys():
    own = {name for mechanism in REGISTRY.values() for name in mechanism.options}
    assert set(Options.__annotations__) == own | {*SHARED_FIELDS, "variant", "max_source_positions"}


def test_labels_and_rows_of_tables():
    labels = [mechanism.label for mechanism in by_row()]
    assert len(set(labels)) == len(KINDS)
    assert labels[:7] == [
        "softmax",
        "linear",
        "linear, relu",
        "linear, elu + 1",
        "cosFormer",
        "LeaPformer",
        "Performer",
    ]


def test_the_pages_list_every_mechanism():
    of_layers = next(line for line in (DOCS / "nn.md").read_text(encoding="utf-8").splitlines() if "| `kind` |" in line)
    assert set(re.findall(r'`"([\w-]+)"`', of_layers)) == set(KINDS)
    arena = (DOCS / "lra.md").read_text(encoding="utf-8")
    for line in arena.splitlines():
        row = re.fullmatch(r"\| (`.*`) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \| \w+ \|", line)
        if row is None:
            continue
        for name in re.findall(r"`([\w*-]+)`", row[1]):
            for mechanism in REGISTRY.values():
                if mechanism.name == name or (name.endswith("*") and mechanism.name.startswith(name[:-1])):
                    assert tuple(vars(mechanism.capabilities).values()) == tuple(
                        word == "yes" for word in row.groups()[1:]
                    )
    assert all(f"`{mechanism.name}`" in arena for mechanism in REGISTRY.values() if mechanism.compared)


def test_an_unknown_option_is_refused_and_one_of_another_mechanism_is_not():
    assert build_attention("softmax", hidden_size=16, num_heads=4, leap_hidden=3, num_hashes=5) is not None
    with pytest.raises(TypeError, match="build_attention: expected options of .*leap_hidden.*, got 'leap_hiden'"):
        build_attention("leap", hidden_size=16, num_heads=4, leap_hiden=3)


def test_configurations_share_the_fields_of_attention():
    own = [set(vars(config).get("__annotations__", {})) for config in (LeapformerConfig, LeapformerTranslationConfig)]
    shared = own_fields(LeapformerConfig).keys() & own_fields(LeapformerTranslationConfig).keys()
    assert {"variant", "leap_hidden", "reweighting", "attention_impl", "hidden_act"} <= shared
    # Those that both have and whose default is not the same.
    assert own[0] & own[1] == {
        "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_dropout", "pad_token_id",
        "bos_token_id", "eos_token_id",
    }  # fmt: skip
    assert (
        LeapformerTranslationConfig.choices()["variant"] == LeapformerConfig.choices()["variant"] == ("paper", "gated")
    )
    assert LeapformerConfig.choices()["attention"] == KINDS


# ---- objects in place of names


class Halved(nn.Module):
    """A feature map with a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.relu(x) * self.scale


class Always(nn.Module):
    """A proportion that is the same for every token."""

    def forward(self, x):
        return torch.full(x.shape[:3], 0.25)


def outputs(**composition):
    torch.manual_seed(0)
    layer = LinearAttention(16, 4, **composition)
    torch.manual_seed(1)
    return layer, layer(torch.randn(2, 9, 16), visible="causal")[0]


@pytest.mark.parametrize(
    ("objects", "names"),
    [
        ({"feature_map": torch.relu}, {"feature_map": "relu"}),
        ({"feature_map": elu_plus_one, "reweighting": Cosine()}, {"feature_map": "elu"}),
        ({"proportion": PositionProportion(32)}, {"proportion": "position", "max_positions": 32}),
    ],
    ids=["feature map", "re-weighting", "positions"],
)
def test_an_object_is_what_its_name_stands_for(objects, names):
    torch.testing.assert_close(outputs(**objects)[1], outputs(**names)[1], atol=0, rtol=0)


def test_modules_of_a_composition_are_trained():
    layer, y = outputs(feature_map=Halved(), proportion=(LeapModule(4, hidden=2), LeapModule(4, hidden=2)))
    assert {"feature_map.scale", "q_proportion.w1", "k_proportion.w2"} <= {name for name, _ in layer.named_parameters()}
    assert not layer.is_plain_leap
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_proportion_for_both_that_is_always_the_same_changes_nothing():
    torch.testing.assert_close(outputs(proportion=Always())[1], outputs(proportion=None)[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        ({"feature_map": "rleu"}, r"feature_map: expected one of \['elu', 'relu', 'silu'\], got 'rleu'"),
        ({"feature_map": 3}, r"feature_map: expected one of \['elu', 'relu', 'silu'\], got 3"),
        ({"reweighting": 3}, r"reweighting: expected one of \['cosine', 'quadratic'\], got 3"),
        (
            {"proportion": "place"},
            "proportion: expected None, 'position', 'learned', 'prior' or 'running', got 'place'",
        ),
        ({"proportion": (Always(), 3)}, "proportion: expected None, 'position', 'learned', 'prior' or 'running', got"),
    ],
)
def test_what_is_no_part_of_a_composition_is_refused(composition, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(16, 4, **composition)


# ---- step by step


STREAMING = [kind for kind in KINDS if kind == "softmax" or REGISTRY[kind].capabilities.streaming]


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_kv_heads": 2, "conv_width": 3},
        {"variant": "gated"},
        {"variant": "gated", "proportion": "running", "clocks": 2, "num_kv_heads": 2, "leap_places": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", STREAMING)
def test_a_source_in_pieces_is_the_source(kind, fields):
    """Absorbed in two pieces and read, beside the whole at once; rows of other lengths, and the mass of every chunk."""
    torch.manual_seed(0)
    limits = {"max_positions": 32, "max_source_positions": 32} if kind == "cosformer" else {}
    sizes = {"hidden_size": 64, "num_heads": 4, "num_features": 16, "cross": True}
    layer = build_attention(kind, **sizes, **limits, **fields).double().eval()
    x, source = torch.randn(2, 2, 64).double(), torch.randn(2, 7, 64).double()
    lengths, places = torch.tensor([7, 5]), torch.arange(2)[None].expand(2, 2)
    real = torch.arange(7) < lengths[:, None]
    whole, _ = layer(x, source, key_mask=real, position_ids=places)
    state, found = layer.empty_state(source, keep_mass=True), []
    layer.absorb(source[:, :4], state, first=torch.zeros(2, dtype=torch.int64), chunk=2)
    layer.absorb(source[:, 4:], state, first=torch.tensor([4, 4]), key_mask=real[:, 4:], chunk=2)
    for i in range(2):
        keywords = {"position_ids": places[:, i : i + 1]}
        mass = layer.mass(x[:, i : i + 1], state, chunk=2, **keywords)
        assert mass.shape == (2, 4, 4) and mass[1, :, 3].eq(0).all()
        torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, dtype=mass.dtype), atol=1e-6, rtol=0)
        found.append(layer.read(x[:, i : i + 1], state, **keywords))
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", STREAMING)
def test_rows_of_states_are_joined_taken_and_put(kind):
    torch.manual_seed(0)
    layer = build_attention(kind, hidden_size=16, num_heads=4, num_features=16, conv_width=2).eval()
    source, states, first = torch.randn(2, 6, 16), [], torch.zeros(1, dtype=torch.int64)
    for row, length in enumerate((3, 6)):
        state = layer.empty_state(source[:1], keep_mass=True)
        layer.absorb(source[row : row + 1, :length], state, first=first, chunk=2)
        states.append(state)
    both = type(states[0]).join(states)
    x, keywords = torch.randn(2, 1, 16), {"position_ids": torch.zeros(2, 1, dtype=torch.int64)}
    alone = [layer.read(x[r : r + 1], states[r].snapshot(), position_ids=torch.zeros(1, 1).long()) for r in range(2)]
    torch.testing.assert_close(layer.read(x, both.snapshot(), **keywords), torch.cat(alone), atol=1e-5, rtol=1e-5)
    turned = both.take(torch.tensor([1, 0]))
    turned.put(torch.tensor([0]), states[0])  # now row 0 twice
    mass = layer.mass(x[:1].expand(2, 1, 16), turned, chunk=2, **keywords)
    torch.testing.assert_close(mass[0], mass[1], atol=1e-6, rtol=1e-6)
    assert turned.take(torch.tensor([0])).nbytes <= both.nbytes


def test_a_mechanism_without_a_state_says_so():
    layer = build_attention("informer", hidden_size=16, num_heads=4)
    with pytest.raises(ValueError, match="InformerAttention: expected a mechanism that goes on from a state, got one"):
        layer.empty_state(torch.zeros(1, 0, 16))
