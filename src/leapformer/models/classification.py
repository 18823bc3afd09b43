"""Classification of sequences, single or in pairs: an encoder, a pooling and a small head.

Letters: B sequences, T tokens, D hidden size, N classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from leapformer.models.configuration import LeapformerConfig
from leapformer.models.loss import reduce_losses, token_losses
from leapformer.models.modeling import (
    LeapformerPreTrainedModel,
    build_block,
    build_embedding,
    build_positions,
    choose_leap_hidden,
    count_positions,
    new_token_mask,
)


class LeapformerEncoder(LeapformerPreTrainedModel):
    """Token embeddings, positions and blocks in which every token sees every token; the output is the last hidden state.

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
        leap_hidden = choose_leap_hidden(config, LeapformerForSequenceClassification)
        self.blocks = nn.ModuleList(
            build_block(config, layer, leap_hidden, causal=False, longest=longest)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """input_ids [B, T] int64, attention_mask [B, T] (1 = real; None: all) -> last_hidden_state [B, T or T + 1, D].

        Raises ValueError for a mask of another shape, and for more than max_position_embeddings tokens where there is a limit.
        """
        key_mask = new_token_mask(attention_mask, *input_ids.shape, past=0)
        hidden = self.embed_tokens(input_ids)
        if self.cls_embedding is not None:
            hidden = torch.cat([self.cls_embedding.weight[None].expand(len(hidden), -1, -1).to(hidden), hidden], dim=1)
            key_mask = None if key_mask is None else F.pad(key_mask, (1, 0), value=True)
        tokens = hidden.shape[1]
        position_ids = count_positions(key_mask, None, None, tokens, hidden.device)
        self._check_length(position_ids, tokens, extra=self.symbols_before)
        hidden = hidden * self.config.embedding_scale  # type: ignore[operator]
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids).to(hidden.dtype) * self.config.position_scale
        hidden = self.dropout(hidden)
        states: list[Tensor] = []
        for block in self.blocks:
            if output_hidden_states:
                states.append(hidden)
            call = partial(block.__call__, key_mask=key_mask, position_ids=position_ids)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(call, hidden)[0]
            else:
                hidden = call(hidden)[0]
        hidden = self.norm(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden, hidden_states=(*states, hidden) if output_hidden_states else None
        )
        return output if return_dict is not False else output.to_tuple()

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One vector [B, D] for each sequence: the mean over real tokens (0 where there are none) or the symbol's state."""
        hidden = self(input_ids, attention_mask).last_hidden_state
        if self.cls_embedding is not None:
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.mean(1)
        mask = attention_mask.to(hidden.dtype)[..., None]
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
        self.classifier = nn.Sequential(
            nn.Linear(width, config.classifier_hidden_size),
            nn.ReLU(),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(config.classifier_hidden_size, config.num_labels),  # type: ignore[arg-type]
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_ids_1: Tensor | None = None,
        attention_mask_1: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Logits [B, N], and the mean cross-entropy where labels [B] int64 are given.

        input_ids, attention_mask: as in `LeapformerEncoder.forward`; input_ids_1, attention_mask_1: of the second sequence,
        which may have another length, with config.paired_inputs and only then (else ValueError).
        num_items_in_batch: the loss is the sum over examples divided by this; None: their mean.
        """
        if (input_ids_1 is not None) != self.config.paired_inputs:
            found = "none" if input_ids_1 is None else "one"
            expected = "a second sequence, input_ids_1," if self.config.paired_inputs else "no input_ids_1"
            raise ValueError(
                f"sequence classification: expected {expected} with paired_inputs={self.config.paired_inputs}, found {found}"
            )
        features = self.model.pooled(input_ids, attention_mask)
        if input_ids_1 is not None:
            second = self.model.pooled(input_ids_1, attention_mask_1)
            features = torch.cat([features, second, features * second, features - second], dim=-1)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = reduce_losses(token_losses(logits, labels), labels, num_items_in_batch)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()
