"""The configuration of the simultaneous translation model."""

from typing import Literal

from leapformer.models.attention_fields import AttentionFields
from leapformer.models.fields import MOST_LAYERS, words_that_count
from leapformer.nn import REGISTRY, Mechanism

Source = Literal["speech", "text"]
Context = Literal["chunk", "full"]
PLACES = ("encoder_attention", "decoder_attention", "cross_attention")
# Where a mechanism with a longest length needs one: of the source's states, of the target's tokens.
OF_SOURCE, OF_TARGET = ("encoder_attention", "cross_attention"), ("decoder_attention", "cross_attention")
OWN_RANGES: dict[str, tuple[float, float]] = {
    "num_features": (1, 1 << 16),
    "conv_channels": (1, 1 << 16),
    "pre_decision": (1, 1 << 20),
    "encoder_layers": (1, MOST_LAYERS),
    "decoder_layers": (1, MOST_LAYERS),
    "source_vocab_size": (1, 1 << 31),
    "ctc_vocab_size": (1, 1 << 31),
    "max_source_positions": (1, 1 << 40),
    "max_target_positions": (1, 1 << 40),
    "ctc_weight": (0, 1e6),
}


class LeapformerTranslationConfig(AttentionFields):
    r"""Configuration of `LeapformerForConditionalGeneration`; the defaults are the paper's sizes (arXiv 2405.13046,
    sec. 4.3).

    Source:
        source ("speech"): "speech" (features [B, F, num_features]) or "text" (ids, no subsampling).
        num_features (80), conv_channels (256): of the front end for speech.
        source_vocab_size (None: vocab_size): of a text source.
        pre_decision (9): source states read at a time, r: a chunk of the encoder, and a step of wait-k. A state of
            speech is 40 ms, so 9 are 360 ms. A text source reads 1 token at a time where this is 1.
        context ("chunk"): "chunk" (a position sees its whole chunk and the past, so the encoder goes on from a state)
            or "full" (it sees all that was read, so the encoder starts anew at every read, as in the paper; what it was
            trained on, whole utterances, is then not what it reads).
    Sizes:
        vocab_size (10000) of the target, hidden_size (256), encoder_layers (12), decoder_layers (6),
        num_attention_heads (8), num_key_value_heads (None: num_attention_heads), head_dim (None: hidden_size / heads),
        intermediate_size (2048).
    Attention:
        encoder_attention, decoder_attention, cross_attention ("leap"): "leap", "cosformer", "linear" or "softmax", each
            chosen by itself.
        max_source_positions, max_target_positions (None): cosFormer's M of the states of the source and of the tokens
            of the target; a limit where cosFormer is, needed there, and not used elsewhere.
        variant ("paper"), decay, conv_width, output_norm, output_gate (None), qk_norm, rotary, rotary_base,
        attention_update, delta_range, decay_per, leap_hidden (None: head_dim / 4), leap_start, leap_per_head,
        leap_bins, feature_map, reweighting, attention_impl, attention_eps, attention_bias: as in `LeapformerConfig`.
            A decay per channel and the delta rule are for the decoder's self-attention alone, as is the decay that a
            variant sets; rotary positions are for any self-attention.
    Loss:
        label_smoothing (0.1): of the cross-entropy.
        ctc_weight (0.0): above 0 the encoder gets a CTC head, and this times its loss is added.
        ctc_vocab_size (None: vocab_size): symbols of the CTC head; its blank is one more, the last.
    The rest:
        position_scale (1.0): what the sinusoidal positions are multiplied with; 0 for none.
        hidden_act ("relu"), hidden_dropout (0.1), attention_dropout, activation_dropout (0.0), layer_norm_eps.
        tie_word_embeddings (True): the output layer is the embedding of the target.
        initializer_range (0.02), embedding_initializer_range, embedding_scale: as in `LeapformerConfig`.
        pad_token_id (0), bos_token_id (1), eos_token_id (2); the decoder starts with bos_token_id.

    Raises ValueError with the field's name, what was expected and what was found.

    Example:
        >>> LeapformerTranslationConfig(cross_attention="softmax").head_dim
        32
    """

    model_type = "leapformer_translation"
    attribute_map = {"num_hidden_layers": "decoder_layers"}
    keys_to_ignore_at_inference = ["nll", "ctc_loss", "encoder_last_hidden_state"]

    own_ranges = OWN_RANGES

    source: Source = "speech"
    num_features: int = 80
    conv_channels: int = 256
    source_vocab_size: int | None = None
    pre_decision: int = 9
    context: Context = "chunk"

    vocab_size: int = 10_000
    hidden_size: int = 256
    encoder_layers: int = 12
    decoder_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048

    encoder_attention: str = "leap"
    decoder_attention: str = "leap"
    cross_attention: str = "leap"
    max_source_positions: int | None = None
    max_target_positions: int | None = None

    label_smoothing: float | int = 0.1
    ctc_weight: float | int = 0.0
    ctc_vocab_size: int | None = None

    hidden_dropout: float | int = 0.1

    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The names that each field takes which takes no other ones."""
        kinds = tuple(mechanism.name for mechanism in REGISTRY.values() if mechanism.translates)
        return {**dict.fromkeys(PLACES, kinds), **super().choices()}

    def _fill_in(self) -> None:
        if self.leap_hidden is None:
            self.leap_hidden = max(1, (self.head_dim or 0) // 4)
        if self.source_vocab_size is None:
            self.source_vocab_size = self.vocab_size
        if self.ctc_vocab_size is None:
            self.ctc_vocab_size = self.vocab_size

    def source_limit(self) -> int | None:
        """The most source states that this model takes: cosFormer's maximum, or None where any length will do."""
        return self.max_source_positions if self.limited(OF_SOURCE) else None

    def target_limit(self) -> int | None:
        """The most target tokens that this model takes, or None where any length will do."""
        return self.max_target_positions if self.limited(OF_TARGET) else None

    def limited(self, places: tuple[str, ...]) -> tuple[str, Mechanism] | None:
        """The first of ``places`` whose attention has a longest length, and that mechanism."""
        for place in places:
            mechanism = REGISTRY[getattr(self, place)]
            if mechanism.limit is not None:
                return place, mechanism
        return None

    def _check_sizes(self) -> None:
        if self.hidden_size % 2:
            raise ValueError(f"config hidden_size: expected an even number, found {self.hidden_size}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"config label_smoothing: expected a number from 0 to below 1, found {self.label_smoothing}"
            )

    def _about_parameters(self) -> int:
        D, attention = self.hidden_size, self._about_attention()
        layers, C = self.encoder_layers + self.decoder_layers, self.conv_channels
        untied = None if self.tie_word_embeddings else self.vocab_size
        tables = words_that_count(self.vocab_size, untied, self.source_vocab_size, self.ctc_vocab_size)
        front = 9 * C * C + C * self.num_features // 4 * D
        blocks = layers * (attention + 2 * D * self.intermediate_size) + self.decoder_layers * attention
        return blocks + tables * D + front

    def _check_rest(self) -> None:
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            if value is None or not 0 <= value < self.vocab_size:
                raise ValueError(f"config {name}: expected an id below vocab_size={self.vocab_size}, found {value}")
        for name, places in (("max_source_positions", OF_SOURCE), ("max_target_positions", OF_TARGET)):
            found = self.limited(places)
            if found is not None and getattr(self, name) is None:
                raise ValueError(
                    f"config {name}: expected a number, since {found[0]}={found[1].name!r} needs the length "
                    "beforehand, "
                    "found None"
                )
