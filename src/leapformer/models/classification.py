"""Classification of sequences, single or in pairs: an encoder, a pooling and a small head.

Letters: B sequences, T tokens, D hidden size, N classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from leapformer.models.cache import LeapformerCache, absorbed_prefix, is_prefix
from leapformer.models.configuration import LeapformerConfig
from leapformer.models.inputs import check_rest, read_mask, wanted
from leapformer.models.loss import IGNORE_INDEX, reduce_losses, token_losses
from leapformer.models.modeling import LeapformerPreTrainedModel, build_blocks, build_embedding, build_positions
from leapformer.nn.packing import token_positions


class LeapformerEncoder(LeapformerPreTrainedModel):
    """Token embeddings, positions and blocks in which every token sees every token; the output is the last hidden
    state.

    With config.pooling "cls" a symbol of its own comes first, so the output has T + 1 places.

    Example:
        >>> encoder = LeapformerEncoder(LeapformerConfig(hidden_size=16, num_hidden_layers=1))
        >>> encoder(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """

    heads_left_out = ("classifier.", "lm_head.")

    def __init__(self, config: LeapformerConfig):
        super().__init__(config)
        self.symbols_before = int(config.pooling == "cls")
        longest = config.max_position_embeddings + self.symbols_before
        self.embed_tokens = build_embedding(config)
        self.cls_embedding = nn.Embedding(1, config.hidden_size) if self.symbols_before else None
        self.positions = build_positions(config, longest)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = build_blocks(config, LeapformerForSequenceClassification, causal=False, longest=longest)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> BaseModelOutput | tuple:
        """The last hidden state [B, T or T + 1, D] of T tokens.

        Arguments:
            input_ids: [B, T] int64, or instead inputs_embeds: [B, T, D], before the embedding scale.
            attention_mask: [B, T], 1 = real, 0 = padding anywhere; None: all. With a prefix of S keys [B, S + T] will
                do too.
            past_key_values: keys and values for each block, [B, G, S, K], that every token sees besides (prefix
                tuning).

        Raises ValueError for a mask of another shape, for more than max_position_embeddings tokens where there is a
        limit, for output_attentions, and for a prefix of a mechanism that has no state.
        """
        check_rest(type(self).__name__, self.config, output_attentions, rest)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{type(self).__name__}: expected either input_ids or inputs_embeds, found both or neither"
            )
        hidden: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        prefix = self._prefix(past_key_values, hidden)
        before = 0 if prefix is None else prefix.get_seq_length()
        if attention_mask is not None and before and attention_mask.shape[-1] == before + hidden.shape[1]:
            attention_mask = attention_mask[:, before:]
        key_mask = read_mask(attention_mask, *hidden.shape[:2])
        if self.cls_embedding is not None:
            symbol = self.cls_embedding(torch.zeros(1, 1, dtype=torch.int64, device=hidden.device))
            hidden = torch.cat([symbol.expand(len(hidden), -1, -1).to(hidden), hidden], dim=1)
            key_mask = None if key_mask is None else F.pad(key_mask, (1, 0), value=True)
        tokens = hidden.shape[1]
        first = None if prefix is None else prefix.length
        position_ids = token_positions(tokens, hidden.device, key_mask=key_mask, first=first)
        self._check_length(position_ids, before + tokens, extra=self.symbols_before)
        assert self.config.embedding_scale is not None
        hidden = hidden * self.config.embedding_scale
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids).to(hidden.dtype) * self.config.position_scale
        hidden = self.dropout(hidden)
        states: list[Tensor] = []
        keep_states = wanted(output_hidden_states, self.config, "output_hidden_states")
        for number, block in enumerate(self.blocks):
            if keep_states:
                states.append(hidden)
            state = None if prefix is None else prefix.layer(number).state
            call = partial(block.__call__, key_mask=key_mask, position_ids=position_ids, state=state)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(call, hidden)[0]
            else:
                hidden = call(hidden)[0]
        hidden = self.norm(hidden)
        output = BaseModelOutput(last_hidden_state=hidden, hidden_states=(*states, hidden) if keep_states else None)
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()

    def _prefix(self, past: Any, like: Tensor) -> LeapformerCache | None:
        if past is None:
            return None
        if not is_prefix(past, len(self.blocks)):
            raise ValueError(
                f"past_key_values: expected keys and values for {len(self.blocks)} blocks, found {type(past).__name__}"
            )
        return absorbed_prefix(past, self.blocks, like)

    def pooled(self, input_ids: Tensor | None, attention_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """One vector [B, D] for each sequence: the mean over real tokens (0 where there are none) or the symbol's
        state.
        """
        return self.pool(
            self(input_ids, attention_mask, return_dict=True, **keywords).last_hidden_state, attention_mask
        )

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`pooled` of the last hidden state [B, T or T + 1, D]; of a mask [B, S + T] the last T count."""
        if self.cls_embedding is not None:
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.mean(1)
        mask = attention_mask[:, attention_mask.shape[1] - hidden.shape[1] :].to(hidden.dtype)[..., None]
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class LeapformerForSequenceClassification(LeapformerPreTrainedModel):
    """An encoder, pooling, and a ReLU network with one hidden layer over the classes.

    With config.paired_inputs both sequences go through the same encoder, and the head sees [x0, x1, x0 * x1, x0 - x1].

    Example:
        >>> config = LeapformerConfig(hidden_size=16, num_hidden_layers=1, num_labels=3)
        >>> model = LeapformerForSequenceClassification(config)
        >>> model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([2])).logits.shape
        torch.Size([1, 3])
    """

    # The Trainer then passes num_items_in_batch, so that accumulation averages over examples and not over batches.
    accepts_loss_kwargs = True

    def __init__(self, config: LeapformerConfig):
        super().__init__(config)
        self.model = LeapformerEncoder(config)
        width = config.hidden_size * (4 if config.paired_inputs else 1)
        labels: Any = config.num_labels
        self.classifier = nn.Sequential(
            nn.Linear(width, config.classifier_hidden_size),
            nn.ReLU(),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(config.classifier_hidden_size, labels),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids_1: Tensor | None = None,
        attention_mask_1: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Logits [B, N], and the loss where labels are given.

        input_ids, inputs_embeds, attention_mask, past_key_values: as in `LeapformerEncoder.forward`; input_ids_1,
        attention_mask_1: of the second sequence, which may have another length, with config.paired_inputs and only then
        (else ValueError).
        labels: by config.problem_type, or where it is None as transformers does: classes [B] int64 (cross-entropy);
        floats
            [B, N] for several labels at once (binary cross-entropy); floats [B], or [B, N], for a regression (squared
            error), which N = 1 is.
        num_items_in_batch: the loss is the sum divided by this; None: the mean. output_hidden_states: those of the
        first
            sequence.
        """
        if (input_ids_1 is not None) != self.config.paired_inputs:
            found = "none" if input_ids_1 is None else "one"
            expected = "a second sequence, input_ids_1," if self.config.paired_inputs else "no input_ids_1"
            raise ValueError(
                f"sequence classification: expected {expected} with paired_inputs={self.config.paired_inputs}, found "
                f"{found}"
            )
        keywords = {"output_attentions": output_attentions, "past_key_values": past_key_values, **rest}
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **keywords,
        )
        features = self.model.pool(encoded.last_hidden_state, attention_mask)
        if input_ids_1 is not None:
            second = self.model.pooled(input_ids_1, attention_mask_1, **keywords)
            features = torch.cat([features, second, features * second, features - second], dim=-1)
        logits = self.classifier(features)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        kind = self.config.problem_type or _problem_of(logits, labels)
        if kind == "single_label_classification":
            return reduce_losses(token_losses(logits, labels.view(-1)), labels, num_items)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if kind == "regression" and logits.shape[1] == 1:
            wide, labels = wide[:, 0], labels.view(-1)
        if labels.shape != wide.shape:
            raise ValueError(
                f"labels: expected {list(wide.shape)} for problem_type={kind!r}, found {list(labels.shape)}"
            )
        there = labels != IGNORE_INDEX
        targets = labels.to(wide.dtype).masked_fill(~there, 0)
        if kind == "regression":
            losses = (wide - targets).square()
        else:
            losses = F.binary_cross_entropy_with_logits(wide, targets, reduction="none")
        return reduce_losses(losses.masked_fill(~there, 0), labels, num_items)


def _problem_of(logits: Tensor, labels: Tensor) -> str:
    """What transformers makes of labels where the configuration has no problem_type."""
    if logits.shape[1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
