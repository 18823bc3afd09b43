"""The LeaPformer language model for Hugging Face transformers.

Letters: B sequences, T tokens, D hidden size, V vocabulary, N packed sequences.
"""

import os
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut
from leapformer.models.adaptive import START, AdaptiveEmbedding, AdaptiveSoftmax
from leapformer.models.blocks import build_block
from leapformer.models.cache import LeapformerCache, absorbed_prefix, is_prefix
from leapformer.models.configuration import LeapformerConfig
from leapformer.models.inputs import PACKING_NAMES, check_rest, read_layout, wanted
from leapformer.models.loss import next_token_labels, reduce_losses, token_losses
from leapformer.models.reading import CheckpointError, check_folder, check_shapes, weights_of_another
from leapformer.nn import Clocks, LeapModule, LearnedPositions, SinusoidalPositions, hidden_for_share


class SequenceTooLong(LeapformerError, ValueError):
    """A sequence is longer than cosFormer's or learned positions' maximum."""


class LeapformerPreTrainedModel(PreTrainedModel):
    """What all LeaPformer models share: initialisation, strict loading, and an own cache in `generate`."""

    config_class = LeapformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock", "EncoderBlock"]
    # A constant-size state cannot be cropped, so assisted generation is refused.
    _is_stateful = True

    # Beginnings of the names of weights that a checkpoint may have and this model doesn't take.
    heads_left_out: tuple[str, ...] = ()

    config: LeapformerConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As in transformers, from safetensors only, and strict: a missing, surplus or misshapen weight is an error.

        Raises CheckpointError (one line) for a file that is cut off or of another model.
        """
        where = os.fspath(pretrained_model_name_or_path)
        want_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        subfolder = kwargs.get("subfolder") or ""
        check_folder(where, cls.config_class, subfolder)
        if os.path.isdir(where):
            config = _config_of(cls, where, kwargs)
            if not kwargs.get("ignore_mismatched_sizes"):
                check_shapes(where, cls, config, subfolder)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {where}: expected whole safetensors weights, found {error}") from error
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint {where}: its weights have other shapes than its config says") from error
        except OSError as error:
            raise CheckpointError(f"checkpoint {where}: expected safetensors weights, found none") from error
        model, info = loaded
        _check_loaded(where, info, cls)
        return (model, info) if want_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules with parameters of their own, so a special standard deviation is an
        # attribute of the very module (see `start_with`) and not a matter of its parent.
        if isinstance(module, nn.Embedding):
            std: Any = self.config.embedding_initializer_range
            init.normal_(module.weight, std=getattr(module, START, std))
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(module, START, self.config.initializer_range))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif (start := getattr(module, "reset_parameters", None)) is not None:
            # Norms, and what in `leapformer.nn` starts in a way of its own.
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not all(getattr(weight, "_is_hf_initialized", False) for weight in own):
                start()

    def _check_length(self, position_ids: Tensor, slots: int | None, *, extra: int = 0) -> None:
        """Refuse positions past the limit and `extra` ones. Counted positions stay below `slots`: mostly nothing is
        read.
        """
        limit = self.config.length_limit()
        if limit is None or (slots is not None and slots <= limit[0] + extra) or torch.compiler.is_compiling():
            return
        longest, why = limit
        found = int(position_ids.max()) + 1 - extra
        if found > longest:
            raise SequenceTooLong(
                f"sequence too long: expected at most max_position_embeddings={longest} tokens, found {found}; {why} "
                "(attention='leap' with sinusoidal positions takes any length)"
            )

    def num_parameters_added_by_leap(self) -> int:
        """How many of the parameters belong to LeaP modules."""
        return sum(
            p.numel()
            for module in self.modules()
            if isinstance(module, LeapModule | Clocks)
            for p in module.parameters(recurse=False)
        )


class LeapformerModel(LeapformerPreTrainedModel):
    """Token embeddings, positions and blocks of causal attention; the output is the last hidden state.

    Example:
        >>> model = LeapformerModel(LeapformerConfig(hidden_size=16, num_hidden_layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """

    heads_left_out = ("lm_head.",)

    def __init__(self, config: LeapformerConfig):
        super().__init__(config)
        self.embed_tokens = build_embedding(config)
        self.positions = build_positions(config, config.max_position_embeddings)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = build_blocks(config, LeapformerForCausalLM, causal=True)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LeapformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the model over T new tokens.

        Arguments:
            input_ids: [B, T] int64, or instead inputs_embeds: [B, T, D], before the embedding scale.
            attention_mask: [B, T] or, with a cache, [B, past + T]; 1 = real, 0 = padding anywhere. None: all real. The
                numbers of packed sequences (1, 1, 2, 2, 0) are taken too.
            position_ids: [B or 1, T] int64 from 0. None: counted over the real tokens, going on from the cache. Without
                mask and cache a sequence begins wherever they don't go on by 1, as in transformers (in eager mode).
            past_key_values: a `LeapformerCache`, updated in place; or a cache of keys and values for each block, [B, G,
                S, K] (prefix tuning), which is absorbed into a new one. None makes one if use_cache.
            use_cache: None means config.use_cache, but never in training or for packed sequences.
            cu_seqlens: [N + 1] int32, for N sequences packed into one row (B = 1); attention and positions start anew
                in each. A mask beside it says which of the slots are padding.
            rest: cu_seq_lens_q (the same as cu_seqlens) with an equal cu_seq_lens_k, seq_idx [B, T], the number of each
                token's sequence; and what changes nothing, such as cache_position.

        Raises ValueError for a mask of another shape, another kind of cache, packing that contradicts itself,
        output_attentions, or a sequence longer than max_position_embeddings where attention is cosFormer or positions
        are learned.
        """
        told = {name: rest.pop(name, None) for name in PACKING_NAMES}
        check_rest(type(self).__name__, self.config, output_attentions, rest)
        embeds = self._embed(input_ids, inputs_embeds)
        batch, tokens, _ = embeds.shape
        cache = self._cache_of(past_key_values, embeds)
        layout = read_layout(
            (batch, tokens),
            embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            cu_seqlens=cu_seqlens,
            told=told,
        )
        use_cache = self._uses_cache(use_cache, packed=layout.cu_seqlens is not None)
        if use_cache and cache is None:
            cache = LeapformerCache(self.config.num_hidden_layers)
        past = 0 if cache is None else cache.get_seq_length()
        self._check_length(layout.position_ids, past + tokens if layout.counted else None)

        hidden = layout.flat(embeds)
        if self.positions is not None:
            hidden = hidden + self.positions(layout.position_ids).to(hidden.dtype) * self.config.position_scale
        hidden = self.dropout(hidden)
        keywords = {
            "visible": "causal",
            "key_mask": layout.key_mask,
            "position_ids": layout.position_ids,
            "cu_seqlens": layout.cu_seqlens,
        }
        states: list[Tensor] = []
        keep_states = wanted(output_hidden_states, self.config, "output_hidden_states")
        for layer, block in enumerate(self.blocks):
            if keep_states:
                states.append(layout.unflat(hidden))
            hidden = self._run_block(block, hidden, keywords, cache, layer)
        hidden = layout.unflat(self.norm(hidden))
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if keep_states else None,
        )
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()

    def _uses_cache(self, use_cache: bool | None, *, packed: bool) -> bool:
        if use_cache and packed:
            raise ValueError(
                "use_cache: expected False with packed sequences (a cache has one row a sequence), found True"
            )
        return (self.config.use_cache and not self.training and not packed) if use_cache is None else use_cache

    def _cache_of(self, past: Any, embeds: Tensor) -> LeapformerCache | None:
        """The cache that was given, or one that has absorbed the keys and values of another kind of cache."""
        layers = self.config.num_hidden_layers
        if past is None or (isinstance(past, LeapformerCache) and len(past.layers) == layers):
            return past
        if isinstance(past, LeapformerCache) or not is_prefix(past, layers):
            raise ValueError(
                f"past_key_values: expected a LeapformerCache of {layers} layers, "
                f"found {type(past).__name__} of {len(past)} layers"
            )
        return absorbed_prefix(past, self.blocks, embeds)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LeapformerModel: expected either input_ids or inputs_embeds, found both or neither")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        assert self.config.embedding_scale is not None
        return embeds * self.config.embedding_scale

    def _run_block(
        self, block: nn.Module, hidden: Tensor, keywords: dict, cache: LeapformerCache | None, layer: int
    ) -> Tensor:
        if cache is None:
            call = partial(block.__call__, **keywords)
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(call, hidden)[0]
            return call(hidden)[0]
        kept = cache.layer(layer)
        hidden, state = block(hidden, **keywords, state=kept.state, return_state=True)
        kept.store(state, slots=hidden.shape[1])
        return hidden


class LeapformerForCausalLM(LeapformerPreTrainedModel, GenerationMixin):
    """The language model: `LeapformerModel` and an output layer over the vocabulary.

    Example:
        >>> model = LeapformerForCausalLM(LeapformerConfig(hidden_size=16, num_hidden_layers=1))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 3, 256])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # The Trainer then passes num_items_in_batch, so that accumulation averages over tokens and not over batches.
    accepts_loss_kwargs = True

    def __init__(self, config: LeapformerConfig):
        super().__init__(config)
        self.model = LeapformerModel(config)
        self.lm_head: Any  # or what an adapter or another wrapper put around it
        if config.adaptive_cutoffs is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = {}
            self.lm_head = AdaptiveSoftmax(
                config.vocab_size,
                config.hidden_size,
                cutoffs=list(config.adaptive_cutoffs),
                dropout=config.adaptive_dropout,
            )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LeapformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As `LeapformerModel.forward`, and:

        labels: [B, T] int64, shifted inside (place t is scored on labels[t + 1]), -100 ignored. With labels no cache is
            made unless asked for, and an adaptive softmax returns the loss without logits.
        num_items_in_batch: the loss is the sum over tokens divided by this; None: their mean.
        logits_to_keep: only the last so many places (0: all), or a tensor of indices, get logits.

        The logits [B, T, V] have the model's dtype; those of an adaptive softmax are log-probabilities.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens=cu_seqlens,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **rest,
        )
        hidden = outputs.last_hidden_state
        loss: Any = None
        logits: Any = None
        if labels is not None:
            targets = next_token_labels(labels)
            losses, logits = self._losses(hidden, targets)
            loss = reduce_losses(losses, targets, num_items_in_batch)
            logits = None if logits is None else _keep(logits, logits_to_keep)
        else:
            logits = self._logits(_keep(hidden, logits_to_keep))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The loss of every token in nats, [B, T] at least float32: place t is -log p(labels[t + 1]), 0 if ignored."""
        keywords = {"use_cache": False, "cu_seqlens": cu_seqlens, "return_dict": True}
        hidden = self.model(input_ids, attention_mask, **keywords).last_hidden_state
        return self._losses(hidden, next_token_labels(labels))[0]

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Losses [B, T] and, where they had to be computed anyway, the logits [B, T, V]."""
        flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if self.config.adaptive_cutoffs is not None:
            return self.lm_head.token_losses(flat, flat_targets, self._bands()).view(targets.shape), None
        logits = self.lm_head(flat)
        return token_losses(logits, flat_targets).view(targets.shape), logits.view(*targets.shape, -1)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.config.adaptive_cutoffs is not None:
            return self.lm_head.log_probabilities(hidden, self._bands())
        return self.lm_head(hidden)

    def _bands(self) -> list[tuple[Tensor, Tensor]]:
        embedding: Any = self.model.embed_tokens  # an AdaptiveEmbedding, or a wrapper of one
        return embedding.weights()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        """Give `generate` our cache from the start (chunked prefill needs one before the first forward)."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    "generate: expected no cache_implementation (the model has its own cache), "
                    f"found {generation_config.cache_implementation!r}"
                )
            model_kwargs["past_key_values"] = LeapformerCache(self.config.num_hidden_layers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def build_embedding(config: LeapformerConfig) -> nn.Module:
    """The token embeddings of the configuration, plain or adaptive."""
    if config.adaptive_cutoffs is None:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    assert config.embedding_initializer_range is not None
    return AdaptiveEmbedding(
        config.vocab_size,
        config.hidden_size,
        cutoffs=list(config.adaptive_cutoffs),
        factor=config.adaptive_factor,
        std=config.embedding_initializer_range,
    )


def build_positions(config: LeapformerConfig, longest: int) -> nn.Module | None:
    """The positions of the configuration; learned ones for ``longest`` places."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.hidden_size)
    if config.positions == "learned":
        return LearnedPositions(longest, config.hidden_size)
    return None


def build_blocks(
    config: LeapformerConfig, model: type[PreTrainedModel], *, causal: bool, longest: int | None = None
) -> nn.ModuleList:
    """All blocks of the body of ``model``; ``longest``: instead of max_position_embeddings.

    Raises NotCausal where they should be causal and their attention can't.
    """
    place = {
        "leap_hidden": choose_leap_hidden(config, model),
        "max_positions": longest or config.max_position_embeddings,
    }
    parts = 2 * config.num_hidden_layers
    return nn.ModuleList(
        build_block(config, kind, causal=causal, parts=parts, place={**place, "seed": layer})
        for layer, kind in enumerate(config.attention_kinds)
    )


def choose_leap_hidden(config: LeapformerConfig, model: type[PreTrainedModel]) -> int:
    """The LeaP module's r: given, from the wanted share of a ``model``'s parameters, or the paper's head_dim / 4."""
    if config.leap_hidden is not None:
        return config.leap_hidden
    assert config.head_dim is not None and config.num_key_value_heads is not None
    blocks = config.attention_kinds.count("leap")
    if config.leap_share is None or not blocks:
        return max(1, config.head_dim // 4)
    # The same model with plain linear attention instead says how many parameters there are without LeaP.
    fields: dict[str, Any] = config.to_dict() | {"leap_share": None}
    fields["attention"] = ["linear" if kind == "leap" else kind for kind in config.attention_kinds]
    with torch.device("meta"):
        parameters = model(LeapformerConfig(**fields)).num_parameters()
    modules = config.num_attention_heads + config.num_key_value_heads if config.leap_per_head else 2
    if config.proportion == "running":  # one of keys gives the steps
        steps = config.num_key_value_heads if config.leap_per_head else 1
        modules = steps + modules if config.leap_places else steps
    return hidden_for_share(
        config.leap_share, parameters=parameters, modules=blocks * modules, head_dim=config.head_dim
    )


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def _config_of(cls: Any, where: str, kwargs: dict[str, Any]) -> Any:
    """The configuration that `from_pretrained` will use: the one given, or the folder's with the fields among
    ``kwargs``.
    """
    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        return given
    others = {name: value for name, value in kwargs.items() if name != "config"}
    try:
        return cls.config_class.from_pretrained(given or where, **others, return_unused_kwargs=True)[0]
    except (ValueError, OSError, TypeError, AttributeError, KeyError) as error:
        message = cut(error, 400)
        raise CheckpointError(
            message if where in message else f"checkpoint {where}: expected a configuration, found: {message}"
        ) from error


def _check_loaded(where: str, info: dict, cls: "type[LeapformerPreTrainedModel]") -> None:
    """Raise on missing or surplus weights, which transformers would fill at random or drop."""
    missing = sorted(info["missing_keys"])
    surplus = sorted(info["unexpected_keys"])
    # The body alone may be taken out of a model with a head.
    surplus = [key for key in surplus if not key.startswith(cls.heads_left_out)]
    if missing or surplus:
        raise weights_of_another(where, cls, missing, surplus)
