"""The simultaneous translation model: a block-causal encoder of speech or text, and a decoder with wait-k
cross-attention.

Everything here is the parallel form, for training; `leapformer.models.translation_stream` is the same step by step.

Letters: B utterances, F feature frames, S source states, T target tokens, D hidden size, V vocabulary, k and r of
wait-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from leapformer.models.adaptive import START, start_with
from leapformer.models.blocks import build_block
from leapformer.models.inputs import check_rest, has_other_than_bits, wanted
from leapformer.models.loss import IGNORE_INDEX
from leapformer.models.modeling import CheckpointError, LeapformerPreTrainedModel, SequenceTooLong
from leapformer.models.translation_configuration import OF_SOURCE, OF_TARGET, LeapformerTranslationConfig
from leapformer.nn import CosformerCrossAttention, DecoderBlock, EncoderBlock, LayerState, SinusoidalPositions
from leapformer.nn.plain import home_of
from leapformer.nn.subsampling import ConvSubsampling, subsampled_length
from leapformer.ops import Staircase
from leapformer.ops.api import Visible

NO_GENERATE = (
    "translation: expected greedy_translation(model, model.encode(...)), or a DecoderStream to write while reading, "
    "found "
    "generate()"
)

# Fields that an encoder's weights belong to: with other values they would mean something else.
ENCODER_FIELDS = (
    "source",
    "num_features",
    "conv_channels",
    "pre_decision",
    "context",
    "hidden_size",
    "encoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "encoder_attention",
    "variant",
    "decay",
    "decay_per",
    "proportion",
    "clocks",
    "leap_places",
    "conv_width",
    "output_norm",
    "output_gate",
    "qk_norm",
    "rotary",
    "rotary_base",
    "leap_hidden",
    "leap_per_head",
    "leap_bins",
    "feature_map",
    "reweighting",
    "attention_bias",
    "position_scale",
    "layer_norm_eps",
)


class SourceStates(NamedTuple):
    """The encoder's output: ``hidden`` [B, S, D], and ``mask`` bool [B, S] (True = real) or None where all are real."""

    hidden: Tensor
    mask: Tensor | None = None


@dataclass
class TranslationOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: label-smoothed cross-entropy plus ctc_weight times the CTC loss, per target token; None without labels.
        logits: [B, T, V].
        nll: the cross-entropy without smoothing and CTC, nats per token, detached.
        ctc_loss: the CTC loss per target token, detached, where there is a CTC head.
        encoder_last_hidden_state: [B, S, D].
        decoder_hidden_states: where asked for, what entered each block of the decoder and its last state, each [B, T,
            D].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    nll: Tensor | None = None
    ctc_loss: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class SourceEncoder(nn.Module):
    """Front end, positions and pre-LN blocks in which a position sees its chunk and the past, or all there is."""

    def __init__(self, config: LeapformerTranslationConfig) -> None:
        super().__init__()
        self.config = config
        if config.source == "speech":
            self.subsampling = ConvSubsampling(config.num_features, config.hidden_size, channels=config.conv_channels)
            # Features of unit variance give states of unit variance, as the embeddings of text have.
            for conv in self.subsampling.convs:
                assert isinstance(conv, nn.Conv2d)
                start_with(math.sqrt(2 / conv.weight[0].numel()), conv)
            start_with(1 / math.sqrt(self.subsampling.proj.in_features), self.subsampling.proj)
            self.embed_tokens = None
        else:
            assert config.source_vocab_size is not None
            self.subsampling = None
            self.embed_tokens = nn.Embedding(config.source_vocab_size, config.hidden_size)
        self.positions = SinusoidalPositions(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = _blocks(config, config.encoder_layers, config.encoder_attention)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    @property
    def layers(self) -> list[EncoderBlock]:
        """The blocks, in order."""
        return cast(list[EncoderBlock], list(self.blocks))

    @property
    def visible(self) -> Visible:
        """Whom a position sees."""
        return "all" if self.config.context == "full" else Staircase.blocks(self.config.pre_decision)

    def embed(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features [B, F, num_features] or ids [B, S], real up to ``lengths`` [B] -> ([B, S, D], lengths of the
        states).
        """
        if self.subsampling is not None:
            states = self.subsampling(source.to(home_of(self.norm)["dtype"]), lengths)
            return states, None if lengths is None else subsampled_length(lengths)
        return self.embed_text(source), lengths

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> [B, S, D]."""
        assert self.embed_tokens is not None and self.config.embedding_scale is not None
        return self.embed_tokens(ids) * self.config.embedding_scale

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        first: Tensor | None = None,
        states: list[LayerState] | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """Embedded states x [B, S, D] -> (hidden [B, S, D], the blocks' new states, none where none were given).

        mask: bool [B, S], True = real. first: int64 [B], position of x's first state, which begins a chunk; None: 0.
        states: one for each block, of what came before x.
        """
        slots = torch.arange(x.shape[1], device=x.device)[None]
        position_ids = slots if first is None else slots + first.to(x.device)[:, None]
        longest = x.shape[1] if first is None else x.shape[1] + int(first.max())
        check_source_length(longest, self.config)
        x = self.dropout(x + self.positions(position_ids).to(x.dtype) * self.config.position_scale)
        kept: list[LayerState] = []
        for number, block in enumerate(self.blocks):
            state = None if states is None else states[number]
            call = partial(
                block.__call__,
                visible=self.visible,
                key_mask=mask,
                position_ids=position_ids,
                state=state,
                return_state=states is not None,
            )
            if self.gradient_checkpointing and self.training:
                x, new = self._gradient_checkpointing_func(call, x)
            else:
                x, new = call(x)
            if new is not None:
                kept.append(new)
        return self.norm(x), kept

    # Set by transformers where gradient checkpointing is turned on.
    _gradient_checkpointing_func: Any = None


class TargetDecoder(nn.Module):
    """Embeddings, positions and pre-LN blocks of causal self-attention and cross-attention over the source's states."""

    def __init__(self, config: LeapformerTranslationConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = SinusoidalPositions(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = _blocks(config, config.decoder_layers, config.decoder_attention, config.cross_attention)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    @property
    def layers(self) -> list[DecoderBlock]:
        """The blocks, in order."""
        return cast(list[DecoderBlock], list(self.blocks))

    def embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """ids int64 [B, T], positions int64 [1 or B, T] -> [B, T, D]."""
        assert self.config.embedding_scale is not None
        x = self.embed_tokens(ids) * self.config.embedding_scale
        return self.dropout(x + self.positions(position_ids).to(x.dtype) * self.config.position_scale)

    def forward(
        self, ids: Tensor, source: SourceStates, visible: Visible, *, states: list[Tensor] | None = None
    ) -> Tensor:
        """ids int64 [B, T], ``visible`` states of the source for each -> [B, T, D]; a list ``states`` gets each block's
        input.

        Padding of the target stands on the right, where no real token sees it, so it needs no mask.
        """
        check_target_length(ids.shape[1], self.config)
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.embed(ids, position_ids)
        for block in self.blocks:
            if states is not None:
                states.append(x)
            call = partial(block.__call__, position_ids=position_ids, context_visible=visible, context_mask=source.mask)
            if self.gradient_checkpointing and self.training:
                x, _ = self._gradient_checkpointing_func(call, x, source.hidden)
            else:
                x, _ = call(x, source.hidden)
        return self.norm(x)

    _gradient_checkpointing_func: Any = None


class LeapformerForConditionalGeneration(LeapformerPreTrainedModel):
    """Simultaneous translation (or transcription) of speech or text; see docs/models.md.

    Target token i (from 0) sees the first g(i) = min((k + i) r, S) states of the source, r = config.pre_decision, in
    training by the same linear form in which it is run.

    Example:
        >>> config = LeapformerTranslationConfig(
        ...     hidden_size=16, num_attention_heads=2, encoder_layers=1, decoder_layers=1
        ... )
        >>> model = LeapformerForConditionalGeneration(config)
        >>> labels = torch.tensor([[5, 6, 7, 2]])
        >>> model(torch.randn(1, 100, 80), labels=labels, k=3).logits.shape
        torch.Size([1, 4, 10000])

    Source: arXiv 2405.13046, sec. 4.3; wait-k arXiv 1810.08398; a k drawn for each batch arXiv 2005.08595.
    """

    config_class = LeapformerTranslationConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    _tied_weights_keys = {"lm_head.weight": "decoder.embed_tokens.weight"}
    # The Trainer then passes num_items_in_batch, so that accumulation averages over tokens and not over batches.
    accepts_loss_kwargs = True

    config: LeapformerTranslationConfig  # type: ignore[assignment]

    def __init__(self, config: LeapformerTranslationConfig):
        own: Any = config
        super().__init__(own)
        if config.source == "text":
            self.main_input_name = "input_ids"
        self.encoder = SourceEncoder(config)
        self.decoder = TargetDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        assert config.ctc_vocab_size is not None
        self.ctc_head = nn.Linear(config.hidden_size, config.ctc_vocab_size + 1) if config.ctc_weight > 0 else None
        self.post_init()

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        k: int | Tensor | None = None,
        ctc_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        input_ids: Tensor | None = None,
        source_states: SourceStates | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> TranslationOutput | tuple:
        """The logits of every target token, each from the source states that wait-k lets it see, and the loss.

        Arguments:
            input_features: floating [B, F, num_features]; or, where config.source is "text", input_ids: int64 [B, S];
                or instead of both source_states, from `encode`.
            attention_mask: [B, F] or [B, S], 1 = real, padding on the right. None: all real.
            labels: int64 [B, T], the target with its end of sentence, -100 = padding, on the right.
            decoder_input_ids: int64 [B, T]; None: bos_token_id and the labels before.
            k: chunks read before the first token, at least 1, for all or int64 [B]; None (or a value below 1 in the
                tensor): every token sees the whole source.
            ctc_labels: int64 [B, L], -100 = padding on the right, for the CTC head; None: the labels without the end of
                sentence.
            num_items_in_batch: losses are sums over tokens divided by this; None: by the scored labels.

            output_hidden_states: also return what entered each block of the decoder, and its last hidden state.

        Raises ValueError for missing or misshapen input and for output_attentions, SequenceTooLong past cosFormer's
        maximum.
        """
        check_rest(type(self).__name__, self.config, output_attentions, rest)
        if source_states is None:
            source_states = self.encode(input_features, attention_mask, input_ids=input_ids)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("translation: expected labels or decoder_input_ids, found neither")
            _check_right("labels", labels != IGNORE_INDEX)
            decoder_input_ids = self.shift_right(labels)
        visible = wait_k_visibility(k, self.config.pre_decision, source_states.hidden.shape[1])
        states = [] if wanted(output_hidden_states, self.config, "output_hidden_states") else None
        hidden = self.decoder(decoder_input_ids, source_states, visible, states=states)
        logits = self.lm_head(hidden)
        output = TranslationOutput(logits=logits, encoder_last_hidden_state=source_states.hidden)
        output.decoder_hidden_states = None if states is None else (*states, hidden)
        if labels is not None:
            items = (labels != IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            items = items.to(logits.device) if isinstance(items, Tensor) else items
            smoothed, nll = smoothed_losses(logits, labels, self.config.label_smoothing)
            loss = smoothed.sum() / items
            output.nll = (nll.sum() / items).detach()
            if self.ctc_head is not None:
                ctc = self._ctc_losses(source_states, labels, ctc_labels).sum() / items
                loss = loss + self.config.ctc_weight * ctc
                output.ctc_loss = ctc.detach()
            output.loss = loss
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()

    def encode(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> SourceStates:
        """All states of whole utterances; arguments as in `forward`."""
        source = self._source(input_features, input_ids)
        lengths = _lengths(attention_mask, source.shape[0], source.shape[1])
        x, lengths = self.encoder.embed(source, lengths)
        mask = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return SourceStates(self.encoder(x, mask=mask)[0], mask)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the target, those of vocab_size."""
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        decoder: Any = self.decoder
        decoder.embed_tokens = value

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """`shift_right`, by the name that transformers' collators look for."""
        return self.shift_right(labels)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """There is no `generate`: PEFT asks for this method when it wraps a model, and calls it in `generate` alone."""
        raise ValueError(NO_GENERATE)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: simultaneous translation is a `DecoderStream`, or `greedy_translation` for whole
        utterances.
        """
        raise ValueError(NO_GENERATE)

    _prepare_encoder_decoder_kwargs_for_generation = prepare_inputs_for_generation

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels [B, T]: bos_token_id, then all labels but the last, padding as
        pad_token_id.
        """
        assert self.config.pad_token_id is not None and self.config.bos_token_id is not None
        shifted = F.pad(labels[:, :-1], (1, 0), value=self.config.bos_token_id)
        return shifted.masked_fill(shifted == IGNORE_INDEX, self.config.pad_token_id)

    def ctc_log_probs(self, source_states: SourceStates) -> Tensor:
        """log p of every symbol at every state, [B, S, ctc_vocab_size + 1] in at least float32; the last is the
        blank.
        """
        if self.ctc_head is None:
            raise ValueError("translation: expected a CTC head, found config.ctc_weight = 0")
        logits = self.ctc_head(source_states.hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def load_encoder(self, path: str | PathLike[str]) -> None:
        """Take the encoder's weights from another run's model, such as one trained on transcription.

        Raises CheckpointError (one line) where ``path`` holds no such model or its encoder is another.
        """
        other: Any = type(self).from_pretrained(path)
        self.take_encoder(other, named=str(path))

    def take_encoder(self, other: LeapformerForConditionalGeneration, *, named: str = "another model") -> None:
        """`load_encoder` from a model in memory, called ``named`` in errors."""
        for name in ENCODER_FIELDS:
            wanted, found = getattr(self.config, name), getattr(other.config, name)
            if wanted != found:
                raise CheckpointError(f"encoder of {named}: expected {name}={wanted!r}, found {found!r}")
        try:
            self.encoder.load_state_dict(other.encoder.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"encoder of {named}: its weights don't fit: {reason}") from error

    def _source(self, input_features: Tensor | None, input_ids: Tensor | None) -> Tensor:
        expected, source, other = "input_features", input_features, input_ids
        if self.config.source == "text":
            expected, source, other = "input_ids", input_ids, input_features
        if source is None or other is not None:
            raise ValueError(
                f"translation: expected {expected} (config.source is {self.config.source!r}), "
                f"found {'none' if source is None else 'both input_features and input_ids'}"
            )
        return source

    def _ctc_losses(self, source_states: SourceStates, labels: Tensor, ctc_labels: Tensor | None) -> Tensor:
        """-log p(labels | source) in nats, [B]; 0 where an utterance has fewer states than its labels take."""
        if ctc_labels is None:
            ends = self.config.eos_token_id
            ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
            ctc_labels = labels.masked_fill(torch.isin(labels, labels.new_tensor(ends)), IGNORE_INDEX)
        hidden, mask = source_states
        states = torch.full((len(hidden),), hidden.shape[1]) if mask is None else mask.sum(1)
        blank: Any = self.config.ctc_vocab_size
        real = ctc_labels != IGNORE_INDEX
        _check_right("ctc_labels", real)
        return F.ctc_loss(
            self.ctc_log_probs(source_states).transpose(0, 1),
            ctc_labels.masked_fill(~real, 0),
            states,
            real.sum(1),
            blank=blank,
            reduction="none",
            zero_infinity=True,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=getattr(module, START))
            assert module.bias is not None
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def wait_k_visibility(k: int | Tensor | None, ratio: int, states: int) -> Visible:
    """g(i) = min((k + i) ratio, S) over S ``states``; everything where k is None or, in a tensor [B], below 1.

    Raises ValueError for an integer below 1.
    """
    if k is None:
        return "all"
    if isinstance(k, Tensor):
        return Staircase.wait_k(torch.where(k < 1, states, k), ratio)
    if k < 1:
        raise ValueError(f"k: expected at least 1 chunk, or None for the whole source, found {k}")
    return Staircase.wait_k(k, ratio)


def smoothed_losses(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with and without label smoothing: logits [B, T, V], labels [B, T] -> two of [B, T], 0 where
    ignored.

    A share ``smoothing`` of the target is spread over the whole vocabulary (arXiv 1512.00567, sec. 7).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = labels == IGNORE_INDEX
    total = logits.logsumexp(-1)
    nll = total - logits.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
    smoothed = (1 - smoothing) * nll + smoothing * (total - logits.mean(-1))
    return smoothed.masked_fill(ignored, 0), nll.masked_fill(ignored, 0)


def _blocks(config: LeapformerTranslationConfig, layers: int, kind: str, cross: str | None = None) -> nn.ModuleList:
    """The blocks of the encoder, or with cross-attention those of the decoder."""
    longest = config.max_source_positions if cross is None else config.max_target_positions
    place: dict[str, Any] = {"max_positions": longest or 1, "max_source_positions": config.max_source_positions}
    if cross is None:
        place["update"] = "sum"  # the delta rule is of a past, which the decoder alone has
    parts, causal = (2 if cross is None else 3) * layers, cross is not None
    return nn.ModuleList(
        build_block(config, kind, causal=causal, parts=parts, place=place, cross=cross) for _ in range(layers)
    )


def _lengths(mask: Tensor | None, batch: int, slots: int) -> Tensor | None:
    """int64 [B], the real slots of a mask [B, slots] that is padded on the right; None where all are real."""
    if mask is None:
        return None
    if mask.shape != (batch, slots):
        raise ValueError(f"attention_mask: expected [{batch}, {slots}], found {list(mask.shape)}")
    lengths = mask.bool().sum(1)
    # Looking at values costs a synchronisation on other devices.
    if mask.device.type == "cpu" and mask.dtype != torch.bool and not torch.compiler.is_compiling():
        if has_other_than_bits(mask):
            raise ValueError("attention_mask: expected 1 = real and 0 = padding (nothing is packed here), found others")
    _check_right("attention_mask", mask.bool())
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lengths == slots).all()):
        return None
    return lengths


def _check_right(name: str, real: Tensor) -> None:
    """Refuse padding before something real in a row of bool [B, T]; looked at on the CPU, elsewhere it costs a
    synchronisation.
    """
    if real.device.type == "cpu" and not torch.compiler.is_compiling() and bool((real[:, 1:] > real[:, :-1]).any()):
        raise ValueError(f"{name}: expected padding on the right only, found it elsewhere")


def check_source_length(states: int, config: LeapformerTranslationConfig) -> None:
    """Raises SequenceTooLong where cosFormer's maximum is below ``states``."""
    _check_length("source states", states, config, "max_source_positions", OF_SOURCE)


def check_target_length(tokens: int, config: LeapformerTranslationConfig) -> None:
    """Raises SequenceTooLong where cosFormer's maximum is below ``tokens``."""
    _check_length("target tokens", tokens, config, "max_target_positions", OF_TARGET)


def _check_length(
    what: str, found: int, config: LeapformerTranslationConfig, field: str, places: tuple[str, ...]
) -> None:
    limited = config.limited(places)
    if limited is not None and found > getattr(config, field):
        why = (limited[1].limit or "").format(field=field)
        raise SequenceTooLong(
            f"{what}: expected at most {field}={getattr(config, field)}, found {found}; {why} ('leap' takes any length)"
        )


__all__ = [
    "CosformerCrossAttention",
    "LeapformerForConditionalGeneration",
    "SourceEncoder",
    "SourceStates",
    "TargetDecoder",
    "TranslationOutput",
]
