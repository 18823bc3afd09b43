"""Filling in masked tokens: the encoder of the classifier with an output layer, to pre-train it on its task's own
inputs.

Letters: B sequences, T tokens, D hidden size, V vocabulary, M masked tokens of all sequences.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from leapformer.models.classification import LeapformerEncoder
from leapformer.models.configuration import LeapformerConfig
from leapformer.models.inputs import wanted
from leapformer.models.loss import IGNORE_INDEX, reduce_losses, token_losses
from leapformer.models.modeling import LeapformerPreTrainedModel


class LeapformerForMaskedLM(LeapformerPreTrainedModel):
    """`LeapformerEncoder` and an output layer over the vocabulary, whose weights are the embedding's where those are
    tied.

    Example:
        >>> model = LeapformerForMaskedLM(LeapformerConfig(hidden_size=16, num_hidden_layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 256])
        >>> model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 7, -100]])).logits.shape
        torch.Size([1, 256])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # The Trainer then passes num_items_in_batch, so that accumulation averages over tokens and not over batches.
    accepts_loss_kwargs = True

    def __init__(self, config: LeapformerConfig):
        super().__init__(config)
        self.model = LeapformerEncoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits [B, T, V]; with labels [B, T] int64 (-100: not asked for) those of the M asked for, [M, V], and the
        loss.

        Logits of the rest would be most of the memory of a step. num_items_in_batch: the loss is the sum over the M
        divided by this; None: their mean. The other arguments are those of `LeapformerEncoder.forward`.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **rest,
        )
        hidden = encoded.last_hidden_state[:, self.model.symbols_before :]
        loss = None
        if labels is None:
            logits = self.lm_head(hidden)
        else:
            asked = labels != IGNORE_INDEX
            logits, targets = self.lm_head(hidden[asked]), labels[asked]
            loss = reduce_losses(token_losses(logits, targets), targets, num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if wanted(return_dict, self.config, "return_dict") else output.to_tuple()
