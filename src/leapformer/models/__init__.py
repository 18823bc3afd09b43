"""LeaPformer models for Hugging Face transformers. Importing this registers them with the Auto classes. See
docs/models.md.
"""

from leapformer.errors import MissingExtra

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
    )
    from transformers.models.auto import modeling_auto
except ModuleNotFoundError as error:
    raise MissingExtra("lm", package=error.name, purpose="leapformer.models") from error

from leapformer.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from leapformer.models.blocks import NotCausal
from leapformer.models.cache import LeapformerCache
from leapformer.models.classification import LeapformerEncoder, LeapformerForSequenceClassification
from leapformer.models.configuration import LeapformerConfig
from leapformer.models.masked import LeapformerForMaskedLM
from leapformer.models.modeling import (
    CheckpointError,
    LeapformerForCausalLM,
    LeapformerModel,
    SequenceTooLong,
)
from leapformer.models.translation import LeapformerForConditionalGeneration, SourceStates, TranslationOutput
from leapformer.models.translation_configuration import LeapformerTranslationConfig
from leapformer.models.translation_stream import DecoderStream, EncoderStream, greedy_translation

AutoConfig.register(LeapformerConfig.model_type, LeapformerConfig, exist_ok=True)
AutoModel.register(LeapformerConfig, LeapformerModel, exist_ok=True)
AutoModelForCausalLM.register(LeapformerConfig, LeapformerForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LeapformerConfig, LeapformerForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LeapformerConfig, LeapformerForSequenceClassification, exist_ok=True)
AutoConfig.register(LeapformerTranslationConfig.model_type, LeapformerTranslationConfig, exist_ok=True)
# Speech or text is a matter of the configuration, so both classes make the model.
AutoModelForSpeechSeq2Seq.register(LeapformerTranslationConfig, LeapformerForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(LeapformerTranslationConfig, LeapformerForConditionalGeneration, exist_ok=True)


def _register_names() -> None:
    """Put our classes' names where transformers decides by them.

    The Trainer shifts the labels of label smoothing for the names of causal language models alone, and pipelines
    complain of names that they don't know. Registering with the Auto classes doesn't reach these tables.
    """
    tables = {
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": LeapformerForCausalLM,
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": LeapformerForMaskedLM,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": LeapformerForSequenceClassification,
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": LeapformerForConditionalGeneration,
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": LeapformerForConditionalGeneration,
    }
    for table, kind in tables.items():
        getattr(modeling_auto, table)[kind.config_class.model_type] = kind.__name__
    # Around a prefix that PEFT learns the Trainer takes the name of the body for that of the model.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["leapformer_with_prefix"] = LeapformerModel.__name__


_register_names()

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "CheckpointError",
    "DecoderStream",
    "EncoderStream",
    "LeapformerCache",
    "LeapformerConfig",
    "LeapformerEncoder",
    "LeapformerForCausalLM",
    "LeapformerForConditionalGeneration",
    "LeapformerForMaskedLM",
    "LeapformerForSequenceClassification",
    "LeapformerModel",
    "LeapformerTranslationConfig",
    "NotCausal",
    "SequenceTooLong",
    "SourceStates",
    "TranslationOutput",
    "greedy_translation",
]
