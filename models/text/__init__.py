"""From text to batches: tokens of two tokenizers, aligned on the bytes that they stand for.

In the order of a batch's life:

- `text_start`: the token that a plain text starts with
- `token_bytes`: the bytes of every token, by the tokenizer's own description
- `tokens`: tables of tokens, and the tokens of a text with their places in it
- `vocabulary`: the teacher's tokens spelt in the student's
- `windows`: documents cut and packed to the length that both models read
- `messages`: conversations taken apart into what is said and the outline around it
- `chat_turns`: generation prompts and ends of turns; tokenizers prepared for conversations
- `chat_template`: renderings of conversations, and what a model has to write of them
- `call_text`: what both models write alike of a tool call
- `chat_places`: what both models write of a conversation, as one stream of bytes
- `chat_side`: one model's tokens of a conversation, in that stream
- `chat`: windows of conversations
- `encoder_decoder`: windows of prompts and completions
- `own_text`: windows of text that the student writes itself
- `alignment`: anchors and spans of a window
- `collate`: windows -> a batch of tensors
- `mixed_batches`: the same for several teachers
"""

from .alignment import Alignment, align
from .chat import ChatEncoder
from .chat_template import ConversationError
from .chat_turns import chat_tokenizer, tokenizers_for_chat
from .collate import PairCollator
from .encoder_decoder import SourceEncoder, make_encoder
from .tokens import Reading, TokenTable
from .vocabulary import VocabularyMap
from .windows import ModelFacts, PairEncoder

__all__ = [
    "Alignment",
    "ChatEncoder",
    "ConversationError",
    "ModelFacts",
    "PairCollator",
    "PairEncoder",
    "Reading",
    "SourceEncoder",
    "TokenTable",
    "VocabularyMap",
    "align",
    "chat_tokenizer",
    "make_encoder",
    "tokenizers_for_chat",
]
