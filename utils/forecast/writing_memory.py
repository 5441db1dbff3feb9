"""Memory that a student takes to write text: keys and values of all tokens so far, and the logits of the next one."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

WRITTEN_TOGETHER = 64
"""Texts that are written in one batch, where no forecast says how many fit."""
MOST_TOGETHER = 256
"""Texts of a batch, at most: more of them are written hardly faster."""
FLOAT32 = 4
"""Bytes of a key's or value's number: rotated keys are float32 in every precision."""
LOGIT = 32
"""Bytes for each logit of a text: the logits, a copy, their softmax, and its sums in float64."""


@dataclass(frozen=True)
class TextMemory:
    """Memory of one text that is written."""

    bytes: int

    @classmethod
    def of(cls, student: PretrainedConfig, tokens: int) -> "TextMemory":
        """Return that of a text of so many tokens, its beginning included."""
        config: Any = student.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads

        # a layer that grows by a token is there twice, for a moment
        layers = config.num_hidden_layers + 1
        cache = 2 * layers * key_heads * head_width * tokens * FLOAT32
        return cls(cache + config.vocab_size * LOGIT)

    def texts_within(self, budget: float) -> int:
        """Return how many texts a batch may have, a power of two, so that it fits into `budget` bytes; at least 1."""
        together = MOST_TOGETHER
        while together > 1 and together * self.bytes > budget:
            together //= 2
        return together
