"""From a configuration to a block: the one place that knows which field is which argument."""

import math
from collections.abc import Mapping
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.models.adaptive import start_with
from leapformer.nn import REGISTRY, DecoderBlock, EncoderBlock, build_attention

# The fields behind the arguments that every mechanism has; its own are in its entry of the registry.
SHARED_FIELDS = {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "conv_width": "conv_width",
    "output_gate": "output_gate",
    "bias": "attention_bias",
    "dropout": "attention_dropout",
}


class NotCausal(LeapformerError, ValueError):
    """A language model was asked for with a mechanism that is bidirectional."""


def attention_arguments(config: Any, kind: str) -> dict[str, Any]:
    """The arguments of `build_attention` for one kind: those that fields of the configuration set."""
    fields = {**SHARED_FIELDS, **REGISTRY[kind].options}
    given = {name: getattr(config, field) for name, field in fields.items() if field and hasattr(config, field)}
    if given.get("output_norm") is not None:
        given["output_norm"] = given["output_norm"] == "rmsnorm"
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "variant": config.variant,
        **given,
    }


def _refuse_a_past(own: Mapping[str, Any]) -> None:
    """Refuse arguments of a layer that are of a past, where later tokens are seen."""
    if own.get("update") == "delta":
        raise ValueError("config attention_update: expected 'sum' where later tokens are seen, found 'delta'")
    if own.get("decay") and own.get("decay_per") == "channel":
        raise ValueError("config decay_per: expected 'head' where later tokens are seen, found 'channel'")


def block_arguments(config: Any) -> dict[str, Any]:
    """The arguments of a block besides its attention."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "activation": config.hidden_act,
        "dropout": config.hidden_dropout,
        "activation_dropout": config.activation_dropout,
        "norm_eps": config.layer_norm_eps,
    }


def build_block(
    config: Any, kind: str, *, causal: bool, parts: int, place: Mapping[str, Any], cross: str | None = None
) -> EncoderBlock:
    """A block whose attention is of ``kind``, with cross-attention of the kind ``cross``.

    causal: a `DecoderBlock`. parts: how many parts the residual stream sums up; the projections that write into it
    start
        smaller by the square root. place: what the place in the model says of its attention, over the configuration.

    Raises NotCausal where it should be causal and its attention can't.
    """
    # Where nothing is said of it, a decay is of a past; over a source it would be weights that nothing uses. Places of
    # a source and of a target are on no common scale, so nothing is turned between them.
    own = attention_arguments(config, kind)
    own.update({} if causal or own.get("decay") else {"decay": False}, **place)
    own["max_source_positions"] = None
    if not causal:
        _refuse_a_past(own)
    attention = build_attention(kind, **own)
    if causal and not attention.capabilities.causal:
        raise NotCausal(f"config attention: expected a kind that can be causal, found {kind!r} (it is bidirectional)")
    over_source = None
    if cross is not None:
        own = attention_arguments(config, cross)
        own.update(decay=False, rotary=False, update="sum", cross=True, **place)
        over_source = build_attention(cross, **own)
    block = (DecoderBlock if causal else EncoderBlock)(
        attention, cross_attention=over_source, **block_arguments(config)
    )
    outputs = [layer.o_proj for layer in (attention, over_source) if layer is not None]
    start_with(config.initializer_range / math.sqrt(parts), *outputs, block.feed_forward.down_proj)
    return block
