"""Models and tokenizers of others: located, loaded, adapted and exported.

- `locate`: a name -> a local folder, an attached input or a hub id
- `model_folders`: folders of models, and advice about folders that are none
- `gguf_files`: files of llama.cpp, converted once into folders
- `loading`: configs, tokenizers and models by name
- `precision`: 8-bit and 4-bit weights, and what frozen weights are computed in
- `families`: what differs between causal and encoder-decoder models
- `generation`: generation settings that contradict each other, put right
- `adapter_folders`: an adapter that is given in place of a model
- `named`: configs and tokenizers of the two models of a run
- `lora`: a fresh adapter for the student
- `layers`: a smaller model made from some layers of a bigger one
- `student`, `teacher`: the two models of a run; `sharded_teacher`: one that is divided among processes
- `export`: the folder of a finished student
"""

from .families import auto_class, decoder_starts
from .loading import load_config, load_each, load_model, load_tokenizer, random_model
from .lora import add_lora
from .precision import check_weights, frozen_dtype

__all__ = [
    "add_lora",
    "auto_class",
    "check_weights",
    "decoder_starts",
    "frozen_dtype",
    "load_config",
    "load_each",
    "load_model",
    "load_tokenizer",
    "random_model",
]
