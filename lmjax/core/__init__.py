"""The types that every layer of lmjax speaks: what adds, and what honours what."""

from lmjax.core.data import Dataset, LabelledDataset, TextDataset, Tokenizer
from lmjax.core.models import (
    Decoder,
    DecoderOutput,
    Encoder,
    EncoderDecoder,
    EncoderOutput,
    Network,
    NetworkOutput,
    TextModel,
    Unembedding,
)
from lmjax.core.tasks import Evaluator, Predicts, Session, Task
from lmjax.core.values import ASIDE, CARRY, Batch, Mean, Output, Spec, Variables, Work

__all__ = [
    "ASIDE",
    "CARRY",
    "Batch",
    "Dataset",
    "Decoder",
    "DecoderOutput",
    "Encoder",
    "EncoderDecoder",
    "EncoderOutput",
    "Evaluator",
    "LabelledDataset",
    "Mean",
    "Network",
    "NetworkOutput",
    "Output",
    "Predicts",
    "Session",
    "Spec",
    "Task",
    "TextDataset",
    "TextModel",
    "Tokenizer",
    "Unembedding",
    "Variables",
    "Work",
]
