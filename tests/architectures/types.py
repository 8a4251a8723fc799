"""The model types transformers can build for a task, and the class that is built of each."""
from __future__ import annotations

from functools import cache

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# The first mapping that names a type decides its class: the one with the most towers and heads comes first.
MAPPINGS = {
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech_seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "ctc": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "image_cls": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq_cls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "audio_cls": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "backbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}


@cache
def _tasks() -> dict[str, str]:
    """Model type -> the first mapping that has it."""
    found: dict[str, str] = {}
    for task, mapping in MAPPINGS.items():
        for model_type in mapping:
            found.setdefault(model_type, task)
    return found


def model_types() -> list[str]:
    """Every model type of at least one mapping, sorted."""
    return sorted(_tasks())


def task_of(model_type: str) -> str:
    """The mapping the class of this type comes from. Raises KeyError for a type of no mapping."""
    return _tasks()[model_type]


def class_name(model_type: str) -> str:
    """The name of the class that is built."""
    name = MAPPINGS[task_of(model_type)][model_type]
    return name if isinstance(name, str) else name[0]


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that is built. Raises AttributeError if this installation cannot import it."""
    return getattr(transformers, class_name(model_type))


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration of the type, or its text part where that is what the class takes."""
    own, wanted = CONFIG_MAPPING[model_type], model_class(model_type).config_class
    return own if wanted is None or issubclass(own, wanted) else wanted
