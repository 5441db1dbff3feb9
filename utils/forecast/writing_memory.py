"""Memory that a student takes to write text: keys and values of all tokens so far, and the logits of the next one."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

MOST_TOGETHER = 256
"""Texts of a batch, at most: more of them are written hardly faster."""
FLOAT32 = 4
"""Bytes of a key's or value's number: rotated keys are float32 in every precision."""
LOGIT = 32
"""Bytes for each logit of a text: the logits, a copy, their softmax, and its sums in float64."""


@dataclass(frozen=True)
class WritingMemory:
    """Memory that texts take while they are written together."""

    token: int
    """Bytes for each token of a text, its beginning included."""
    text: int
    """Bytes for each text besides."""
    budget: int
    """Bytes that a batch of texts may take."""

    @classmethod
    def of(cls, student: PretrainedConfig, budget: int) -> "WritingMemory":
        """Return that of the texts of a model."""
        config: Any = student.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads

        # a layer that grows by a token is there twice, for a moment
        layers = config.num_hidden_layers + 1
        return cls(
            token=2 * layers * key_heads * head_width * FLOAT32,
            text=config.vocab_size * LOGIT,
            budget=budget,
        )

    def texts(self, tokens: int) -> int:
        """Return how many texts of so many tokens a batch may have, a power of two; at least 1."""
        together = MOST_TOGETHER
        while together > 1 and self.batch(together, tokens) > self.budget:
            together //= 2
        return together

    def batch(self, texts: int, tokens: int) -> int:
        """Return the bytes of a batch of texts."""
        return texts * (tokens * self.token + self.text)
