"""What the configurations of all models say of attention, of blocks and of how weights start: the fields, once, and
their checks.
"""

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from transformers import PreTrainedConfig

from leapformer.files.showing import shown
from leapformer.models.fields import (
    RANGES,
    check_choices,
    check_common,
    check_ranges,
    check_size,
    check_types,
    finish,
    own_fields,
)
from leapformer.models.reading import read_config
from leapformer.nn import FEATURE_MAPS, REWEIGHTINGS
from leapformer.nn.blocks import ACTIVATIONS
from leapformer.nn.build import Variant
from leapformer.nn.decay import DecayPer
from leapformer.nn.delta import Update
from leapformer.nn.layer import OutputGate
from leapformer.nn.proportions import Start
from leapformer.nn.rotary import ROTARY_BASE
from leapformer.ops.api import Impl

OutputNorm = Literal["sum", "rmsnorm"]
LearnedProportion = Literal["learned", "prior", "running"]


class AttentionFields(PreTrainedConfig):
    """The fields that `LeapformerConfig` and `LeapformerTranslationConfig` share; their docstrings explain them.

    A configuration gives ranges of its own fields in `own_ranges` and says in three methods what else it checks.
    """

    own_ranges = {}

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu"

    variant: Variant = "paper"
    decay: bool | None = None
    decay_scales: list[float | int] | tuple[float | int, ...] | None = None
    decay_per: DecayPer = "head"
    conv_width: int | None = None
    output_norm: OutputNorm | None = None
    output_gate: OutputGate | None = None
    qk_norm: bool = False
    rotary: bool = False
    rotary_base: float | int = ROTARY_BASE
    attention_update: Update = "sum"  # PreTrainedConfig has a method `update`
    delta_range: int = 1
    proportion: LearnedProportion | None = None
    clocks: int | None = None
    clock_rate: float | int | None = None
    clock_decades: float | int | None = None
    leap_places: bool | None = None
    leap_hidden: int | None = None
    leap_start: Start = "default"
    leap_per_head: bool = False
    leap_bins: int | None = None
    feature_map: str = "relu"
    reweighting: str = "cosine"
    attention_impl: Impl = "auto"
    attention_eps: float = 1e-6
    attention_bias: bool = True

    position_scale: float | int = 1.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    embedding_scale: float | int | None = None

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_config(cls, json_file)  # transformers' own takes any JSON

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The names that each field takes which takes no other ones."""
        closed = {name: _literals(annotation) for name, annotation in own_fields(cls).items()}
        tables = {"feature_map": FEATURE_MAPS, "reweighting": REWEIGHTINGS, "hidden_act": ACTIVATIONS}
        return {name: names for name, names in closed.items() if names} | {name: tuple(t) for name, t in tables.items()}

    def __post_init__(self, **kwargs):
        check_types(self)
        check_ranges(self, RANGES | self.own_ranges)
        self._check_sizes()
        check_common(self)
        heads, sizes = getattr(self, "num_attention_heads"), getattr(self, "hidden_size")  # noqa: B009
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            self.head_dim = sizes // heads
        if self.embedding_initializer_range is None:
            self.embedding_initializer_range = self.initializer_range
        if self.embedding_scale is None:
            self.embedding_scale = 1 / self.embedding_initializer_range
        self._fill_in()
        check_choices(self, self.choices())
        self._check_composition()
        self._check_rest()
        check_size(self, self._about_parameters())
        finish(self, kwargs, super().__post_init__)

    def _check_composition(self) -> None:
        """What a layer would refuse, before there is one."""
        scales = self.decay_scales
        if scales is not None and not (len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf):
            expected = "[shortest, longest] in tokens, 0 < shortest <= longest"
            raise ValueError(f"config decay_scales: expected {expected}, found {shown(scales)}")
        normed = self.output_norm == "rmsnorm" or (self.output_norm is None and self.variant == "gated")
        if self.proportion == "running" and not normed:
            raise ValueError(
                "config proportion: expected output_norm='rmsnorm' beside 'running', whose weights may be negative, "
                "found another"
            )
        if self.rotary and (self.head_dim or 0) % 2:
            raise ValueError(f"config head_dim: expected an even number with rotary positions, found {self.head_dim}")

    def _check_sizes(self) -> None:
        """What has to be right before anything is filled in."""

    def _fill_in(self) -> None:
        """Fields that follow from others where they are None."""

    def _check_rest(self) -> None:
        """What remains to be checked once all fields have a value."""

    def _about_attention(self) -> int:
        """The parameters of one attention layer, about: projections, output gate, convolution and LeaP."""
        D, heads = getattr(self, "hidden_size"), getattr(self, "num_attention_heads")  # noqa: B009
        K = self.head_dim or 0
        both = heads + (self.num_key_value_heads or 0)
        gate = D * K * heads if self.output_gate is not None else 0
        return 2 * D * K * both + gate + (self.conv_width or 0) * D + both * (self.leap_hidden or 0) * K

    def _about_parameters(self) -> int:
        """The parameters of the largest model of this configuration, without what is small beside the rest."""
        raise NotImplementedError


def _literals(annotation: Any) -> tuple[str, ...]:
    """The names in an annotation that is a Literal, or one or None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(name for part in get_args(annotation) for name in _literals(part))
    return get_args(annotation) if get_origin(annotation) is Literal else ()
