"""The words that the tasks speak of, and a tokenizer that knows just these.

Lower-case words are one token each; digits, capital letters and signs are a token each. So a prompt
is about 20 tokens long, and what a small model spends its capacity on are the rules of the tasks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kay", "leo")
COLORS = ("red", "blue", "green", "black", "white", "gray", "pink", "gold")
# from -> to and the power of ten between them
UNITS = {
    ("cm", "mm"): 1, ("dm", "cm"): 1, ("m", "cm"): 2, ("ha", "ares"): 2, ("euro", "cents"): 2,
    ("km", "m"): 3, ("kg", "grams"): 3, ("tons", "kg"): 3,
}  # fmt: skip
LIKES = "likes"
PAIRS = {"(": ")", "[": "]", "{": "}"}
KEYWORDS = {"if": "fi", "do": "done", "case": "esac"}

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_TOKEN = re.compile(r"[a-z]+|[^\sa-z]")
_FIELD = re.compile(r"\{[a-z]+\}")


def tokens_of(text: str) -> list[str]:
    return _TOKEN.findall(text)


def make_tokenizer(templates: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of everything above and the words of `templates` (their {fields} left out).

    It has no token for the unknown: a word that nobody declared is an error, not a hidden loss.
    """
    words: set[str] = set()
    for template in templates:
        words.update(tokens_of(_FIELD.sub(" ", template)))
    words.update(MONTHS, NAMES, COLORS, *UNITS, *KEYWORDS.items(), *PAIRS.items())
    words.update((LIKES, ";"), string.digits, string.ascii_uppercase)
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
