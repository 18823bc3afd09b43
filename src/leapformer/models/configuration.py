"""The configuration of every LeaPformer model, with Hugging Face's standard names where they exist."""

from typing import Literal

from leapformer.files.showing import shown
from leapformer.models.attention_fields import AttentionFields
from leapformer.models.blocks import attention_arguments
from leapformer.models.fields import MOST_LAYERS, WIDEST, words_that_count
from leapformer.nn import KINDS, REGISTRY

ATTENTION_KINDS = KINDS
Positions = Literal["sinusoidal", "learned", "none"]
Pooling = Literal["mean", "cls"]
OWN_RANGES: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, MOST_LAYERS),
    "max_position_embeddings": (1, 1 << 40),
    "attention_features": (1, 1 << 20),
    "attention_hashes": (1, 1 << 10),
    "attention_block": (1, 1 << 20),
    "attention_random_blocks": (0, 1 << 20),
    "classifier_hidden_size": (1, WIDEST),
    "classifier_dropout": (0, 1),
    "adaptive_factor": (1, 1 << 16),
    "adaptive_dropout": (0, 1),
}
MOST_BANDS = 64  # of an adaptive softmax


class LeapformerConfig(AttentionFields):
    r"""Configuration of every LeaPformer model.

    Sizes:
        vocab_size (256), hidden_size (128), num_hidden_layers (4), num_attention_heads (4), intermediate_size (None:
        4 x hidden_size), num_key_value_heads (None: num_attention_heads), head_dim (None: hidden_size / heads).
    Attention:
        attention ("leap"): one kind for all blocks, or a list with one kind per block (a hybrid):
            "leap" (learned proportions), "cosformer" (P(i) = i / max_position_embeddings), "linear" (no re-weighting;
            "linear-relu" and "linear-elu" are that with the feature map named), "softmax", "performer", and for
            classification alone "linformer", "nystromformer", "skyformer", "reformer", "bigbird", "informer".
        variant ("paper"): "paper" or "gated". It sets the three switches below wherever they are None.
        decay (None): data-dependent decay per head; paper False, gated True in language models and False in encoders,
            where it fades in both directions. Linear kinds only.
        decay_scales (None): [shortest, longest] time scales of the decays at the start, in tokens and in equal ratios
            over the heads; None keeps 98 % a token.
        conv_width (None): width of the causal depthwise convolution on the layer's input, 0 for none;
            paper 0, gated 4. Softmax takes it only where this field asks for it, for a fair comparison.
        output_norm (None): "sum" (the paper's normaliser) or "rmsnorm"; paper "sum", gated "rmsnorm". Linear kinds
            only.
        proportion (None): of "leap", "learned" (the paper's), "prior" (learned from the place on, see
            `leapformer.nn.PriorProportion`) or "running" (clocks, see `leapformer.nn.Clocks`; they need output_norm
            "rmsnorm"); None is "learned".
        clocks (None: 1), clock_rate (None: pi/2), clock_decades (None: 2), leap_places (None: False): of running
            proportions; clocks of a head, radians a step of the fastest at the start, powers of ten down to the
            slowest, and whether the paper's proportions are added.
        output_gate (None): "silu" or "sigmoid": the heads' outputs times silu or sigmoid of a projection of the layer's
            input, for every kind; hidden_size x heads x head_dim parameters a layer.
        qk_norm (False): norms of queries and keys; rotary (False), rotary_base (10000): rotary positions of
            self-attention, beside or (positions="none") in place of added ones. Which kinds take them: docs/nn.md.
        decay_per ("head"): or "channel", a decay for each channel of the keys. Linear kinds, language models only.
        attention_update ("sum"): or "delta", the delta rule; delta_range (1): or 2. Linear kinds, language models only.
        leap_hidden (None): hidden size r of the LeaP module; None is head_dim / 4, the paper's; 1 is one linear layer.
        leap_share (None): instead of leap_hidden, the share of parameters that LeaP may add, such as 0.002.
        leap_start ("default"): how the LeaP module starts, "default" or "spread".
        leap_per_head (False): one module per head instead of one shared over the heads.
        leap_bins (None): round learned proportions to this many values, with a straight-through gradient.
        feature_map ("relu"), reweighting ("cosine"): names from `leapformer.nn`.
        attention_impl ("auto"): which implementation of `leapformer.ops` runs.
        attention_eps (1e-6): the clamp of the normaliser.
        attention_bias (True): biases of the projections.
        attention_features (128): landmarks, projections, random features or chosen queries of the mechanisms from
            "performer" on; attention_hashes (2): rounds of "reformer"; attention_block (64): tokens of a chunk of
            "reformer" and of a block of "bigbird"; attention_random_blocks (3): of "bigbird".
    Positions:
        positions ("sinusoidal"): "sinusoidal" (any length), "learned" or "none".
        max_position_embeddings (2048): a limit for cosFormer, Linformer and learned positions, and for nothing else.
        position_scale (1.0): what sinusoidal positions are multiplied with.
    Classification (`LeapformerForSequenceClassification`), besides transformers' num_labels, id2label and label2id:
        pooling ("mean"): of the last hidden states over real tokens, or "cls": the state of a symbol of its own put
            first, which is no token of the vocabulary and takes none of max_position_embeddings.
        paired_inputs (False): two sequences, input_ids and input_ids_1, through the same encoder.
        classifier_hidden_size (128), classifier_dropout (0.0): of the head, a ReLU network of one hidden layer.
    The rest:
        hidden_act ("relu"; or "gelu", "silu"), hidden_dropout, attention_dropout, activation_dropout (0.0),
        layer_norm_eps,
        final_norm (True): a LayerNorm after the last block.
        tie_word_embeddings (True): the output layer is the input embedding.
        adaptive_cutoffs (None): band limits such as [20000, 60000] of an adaptive input and softmax (Baevski and Auli);
        adaptive_factor (4), adaptive_dropout (0.0). They need tied embeddings.
        initializer_range (0.02): standard deviation of every projection; the two that write into the residual stream
            are divided by sqrt(2 x num_hidden_layers).
        embedding_initializer_range (None: initializer_range), embedding_scale (None: 1 / embedding_initializer_range):
            a token enters the first block with unit variance, while tied logits start small.

    Raises ValueError with the field's name, what was expected and what was found.

    Example:
        >>> config = LeapformerConfig(num_hidden_layers=2, attention=["leap", "softmax"])
        >>> config.attention_of(1)
        'softmax'
    """

    model_type = "leapformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    own_ranges = OWN_RANGES

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int | None = None

    attention: str | list[str] | tuple[str, ...] = "leap"
    leap_share: float | None = None
    attention_features: int = 128
    attention_hashes: int = 2
    attention_block: int = 64
    attention_random_blocks: int = 3

    positions: Positions = "sinusoidal"
    max_position_embeddings: int = 2048

    hidden_dropout: float | int = 0.0
    final_norm: bool = True

    pooling: Pooling = "mean"
    paired_inputs: bool = False
    classifier_hidden_size: int = 128
    classifier_dropout: float | int = 0.0

    adaptive_cutoffs: list[int] | tuple[int, ...] | None = None
    adaptive_factor: int = 4
    adaptive_dropout: float | int = 0.0

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The names that each field takes which takes no other ones."""
        return {"attention": tuple(REGISTRY), **super().choices()}

    def _fill_in(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.attention, tuple):
            self.attention = list(self.attention)
        if isinstance(self.attention, list) and len(self.attention) != self.num_hidden_layers:
            raise ValueError(
                f"config attention: expected one kind per block ({self.num_hidden_layers}), found {len(self.attention)}"
            )

    def attention_of(self, layer: int) -> str:
        """The attention kind of block `layer`."""
        return self.attention if isinstance(self.attention, str) else self.attention[layer]

    @property
    def attention_kinds(self) -> list[str]:
        """The attention kind of every block, in order."""
        return [self.attention_of(layer) for layer in range(self.num_hidden_layers)]

    def length_limit(self) -> tuple[int, str] | None:
        """The longest sequence that this model takes and why, or None where any length will do."""
        field = "max_position_embeddings"
        for mechanism in REGISTRY.values():
            if mechanism.limit is not None and mechanism.name in self.attention_kinds:
                return self.max_position_embeddings, mechanism.limit.format(field=field)
        if self.positions == "learned":
            return self.max_position_embeddings, f"learned positions exist up to {field} only"
        return None

    def _about_parameters(self) -> int:
        D = self.hidden_size
        block = self._about_attention() + 2 * D * (self.intermediate_size or 0)
        weights = [(REGISTRY[kind].weights, attention_arguments(self, kind)) for kind in self.attention_kinds]
        other = sum(count(arguments) for count, arguments in weights if count is not None)
        words = words_that_count(self.vocab_size, None if self.tie_word_embeddings else self.vocab_size)
        tables = words + self.max_position_embeddings * (self.positions == "learned")
        return self.num_hidden_layers * block + other + tables * D + 4 * D * self.classifier_hidden_size

    def _check_rest(self) -> None:
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"config hidden_size: expected an even number with sinusoidal positions, found {self.hidden_size}"
            )
        if self.leap_share is not None and not 0 < self.leap_share < 1:
            raise ValueError(f"config leap_share: expected a number between 0 and 1, found {self.leap_share}")
        if self.leap_hidden is not None and self.leap_share is not None:
            raise ValueError("config leap_hidden and leap_share: expected at most one of the two, found both")
        self._check_adaptive()

    def _check_adaptive(self) -> None:
        if self.adaptive_cutoffs is None:
            return
        limits = list(self.adaptive_cutoffs)
        rising = limits == sorted(set(limits)) and len(limits) <= MOST_BANDS
        if not limits or not rising or limits[0] < 1 or limits[-1] >= self.vocab_size:
            raise ValueError(
                "config adaptive_cutoffs: expected rising limits between 1 and vocab_size - 1 = "
                f"{self.vocab_size - 1}, "
                f"at most {MOST_BANDS}, found {shown(limits)}"
            )
        if not self.tie_word_embeddings:
            raise ValueError("config adaptive_cutoffs: expected tie_word_embeddings=True, found False")
        self.adaptive_cutoffs = limits
