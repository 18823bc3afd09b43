"""LeaPformer models for Hugging Face transformers. Importing this registers them with the Auto classes. See docs/models.md."""

from leapformer.errors import MissingExtra

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )
except ModuleNotFoundError as error:
    raise MissingExtra("lm", package=error.name, purpose="leapformer.models") from error

from leapformer.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from leapformer.models.cache import LeapformerCache
from leapformer.models.classification import LeapformerEncoder, LeapformerForSequenceClassification
from leapformer.models.configuration import LeapformerConfig
from leapformer.models.masked import LeapformerForMaskedLM
from leapformer.models.modeling import (
    CheckpointError,
    LeapformerForCausalLM,
    LeapformerModel,
    NotCausal,
    SequenceTooLong,
)

AutoConfig.register(LeapformerConfig.model_type, LeapformerConfig, exist_ok=True)
AutoModel.register(LeapformerConfig, LeapformerModel, exist_ok=True)
AutoModelForCausalLM.register(LeapformerConfig, LeapformerForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LeapformerConfig, LeapformerForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LeapformerConfig, LeapformerForSequenceClassification, exist_ok=True)

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "CheckpointError",
    "LeapformerCache",
    "LeapformerConfig",
    "LeapformerEncoder",
    "LeapformerForCausalLM",
    "LeapformerForMaskedLM",
    "LeapformerForSequenceClassification",
    "LeapformerModel",
    "NotCausal",
    "SequenceTooLong",
]
