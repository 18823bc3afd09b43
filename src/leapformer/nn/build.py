"""The registry of mechanisms, and an attention layer by name. A new mechanism is a file beside this one and a line in
``MECHANISMS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

from leapformer.nn import bigbird, informer, linear, linformer, nystromformer, performer, reformer, skyformer, softmax
from leapformer.nn.decay import DecayPer
from leapformer.nn.delta import Update
from leapformer.nn.feature_maps import FeatureMap
from leapformer.nn.layer import AttentionLayer, Mechanism, Shared
from leapformer.nn.linear import Proportions
from leapformer.nn.proportions import Start
from leapformer.nn.reweighting import Reweighting
from leapformer.ops.api import Impl

Variant = Literal["paper", "gated"]

MECHANISMS: tuple[Mechanism, ...] = (
    *linear.MECHANISMS,
    softmax.MECHANISM,
    performer.MECHANISM,
    linformer.MECHANISM,
    nystromformer.MECHANISM,
    skyformer.MECHANISM,
    reformer.MECHANISM,
    bigbird.MECHANISM,
    informer.MECHANISM,
)
REGISTRY: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in MECHANISMS}
KINDS = tuple(REGISTRY)


def by_row() -> list[Mechanism]:
    """All mechanisms in the order of tables."""
    return sorted(REGISTRY.values(), key=lambda mechanism: mechanism.row)


class Options(Shared, total=False):
    """What ``build_attention`` takes besides the sizes; a mechanism takes its own from it."""

    variant: Variant
    decay: bool | None
    output_norm: bool | None
    decay_scales: Sequence[float] | None
    decay_per: DecayPer
    proportion: Proportions | None
    clocks: int
    clock_rate: float
    clock_decades: float
    leap_places: bool
    cross: bool
    leap_hidden: int
    leap_per_head: bool
    leap_bins: int | None
    leap_start: Start
    qk_norm: bool
    rotary: bool
    rotary_base: float
    update: Update
    delta_range: int
    feature_map: str | FeatureMap
    reweighting: str | Reweighting
    max_positions: int
    max_source_positions: int | None
    num_features: int
    num_hashes: int
    block_size: int
    random_blocks: int
    seed: int
    eps: float
    impl: Impl


def build_attention(kind: str, *, hidden_size: int, num_heads: int, **options: Unpack[Options]) -> AttentionLayer:
    """One attention layer by name, one of ``KINDS``; options of other mechanisms change nothing, and None is the
    default.

    ``variant`` "gated" turns on decay, a convolution of width 4 and the output norm for the linear kinds; each of the
    three switches can be set by itself. The other kinds take the convolution only where ``conv_width`` asks for it.
    With ``max_source_positions`` it is cross-attention over a source of at most so many states, where cosFormer needs
    that. All options are in docs/nn.md.

    Raises:
        ValueError: an unknown name, or a value that the mechanism refuses. TypeError: an unknown option.
    """
    if kind not in REGISTRY:
        raise ValueError(f"attention: expected one of {', '.join(REGISTRY)}, got {kind!r}")
    mechanism = REGISTRY[kind]
    own, longest = mechanism_arguments(mechanism, options), options.get("max_source_positions")
    layer: Any = mechanism.layer
    if mechanism.over_source is None or longest is None:
        return layer(hidden_size, num_heads, **own, **mechanism.fixed)
    layer = mechanism.over_source
    return layer(hidden_size, num_heads, **own, max_source_positions=longest)


def mechanism_arguments(mechanism: Mechanism, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that its layers take, with what the variant adds and without what its name stands for."""
    known = {*Options.__annotations__, *(name for other in REGISTRY.values() for name in other.options)}
    for name in options:
        if name not in known:
            raise TypeError(f"build_attention: expected options of {', '.join(sorted(known))}, got {name!r}")
    variant = options.get("variant", "paper")
    if variant not in ("paper", "gated"):
        raise ValueError(f"variant: expected 'paper' or 'gated', got {variant!r}")
    takes = {*Shared.__annotations__, *mechanism.options} - {*mechanism.fixed}
    own = {name: value for name, value in options.items() if name in takes and value is not None}
    return {**mechanism.gated, **own} if variant == "gated" else own
