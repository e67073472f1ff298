"""Training data: JSONL files, chat templates, and batches whose labels mark the prompt's end."""

from milora.data.collator import CompletionCollator
from milora.data.encoding import EncodedDataset, Encoder, encode_examples
from milora.data.jsonl import Example, read_examples, read_prompts

__all__ = [
    "CompletionCollator",
    "EncodedDataset",
    "Encoder",
    "Example",
    "encode_examples",
    "read_examples",
    "read_prompts",
]
