"""Examples for model card and report: code that loads an exported student without this project, and a command."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..machine.launcher import program
from ..run_layout import CONFIG

_CODE = """\
{imports}

folder = {folder}
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
{inputs}
print(tokenizer.decode({written}))"""

_MODEL_IMPORTS = "from transformers import {loader}, AutoTokenizer"
_ADAPTER_IMPORTS = """\
from peft import {loader}
from transformers import AutoTokenizer, GenerationConfig"""

# peft loads the base's generation config, which may stop at another token than the adapter learned to write.
_ADAPTER_STOPS = "model.generation_config = GenerationConfig.from_pretrained(folder)  # not that of the base\n"

_TEXT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=50)[0]"""
_MESSAGES = """
messages = [{"role": "user", "content": "Tell me a story."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=50)[0]"""


def is_adapter(settings: Mapping[str, Any]) -> bool:
    """Return True if a run with these settings exports a LoRA adapter alone, and not a whole model."""
    lora = (settings.get("student") or {}).get("lora") or {}
    return bool(lora.get("enabled") and not lora.get("merge"))


def pipeline_tag(results: Mapping[str, Any]) -> str:
    """Return the hub's name for the task of a student."""
    return "text2text-generation" if results["student"].get("encoder_decoder") else "text-generation"


def how_to_use(folder: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return code that loads the student and lets it write.

    The student continues a text or, where it learned from conversations or examples, answers a prompt that reads as in
    training.

    Args:
        folder: where the student lies, as an expression of Python.
        settings: of the run, nested.
        results: see `utils.report.results`.
    """
    is_seq2seq = results["student"].get("encoder_decoder")
    answers_messages = results.get("prompted") and not is_seq2seq

    # The class that loads the student, and the library that has it.
    model_class = "ModelForSeq2SeqLM" if is_seq2seq else "ModelForCausalLM"
    if is_adapter(settings):
        loader = f"AutoPeft{model_class}"
        imports = _ADAPTER_IMPORTS
        inputs = _ADAPTER_STOPS
    else:
        loader = f"Auto{model_class}"
        imports = _MODEL_IMPORTS
        inputs = ""

    # Of an answer the prompt is cut off; an encoder-decoder model does not repeat it.
    if answers_messages:
        inputs += _MESSAGES
        written = 'written[inputs["input_ids"].shape[1] :], skip_special_tokens=True'
    elif is_seq2seq:
        inputs += _TEXT
        written = "written, skip_special_tokens=True"
    else:
        inputs += _TEXT
        written = "written"

    return _CODE.format(
        imports=imports.format(loader=loader),
        folder=folder,
        loader=loader,
        inputs=inputs,
        written=written,
    )


def lm_eval_command(folder: str, base: str, settings: Mapping[str, Any]) -> str:
    """Return the command that measures a student on a task; lm_eval is given an adapter beside its base.

    Args:
        folder: where the student lies.
        base: name of the model that it started from.
    """
    models = f"pretrained={folder}"
    if is_adapter(settings):
        models = f"pretrained={base},peft={folder},tokenizer={folder}"
    return f"lm_eval --model hf --model_args {models} --tasks arc_easy"


def repeat_command(settings: Mapping[str, Any]) -> str:
    """Return the command that does the same run again, in another folder; "" where the run's folder is not known."""
    folder = settings.get("output_dir")
    if not folder:
        return ""

    config = shlex.quote(str(Path(folder) / CONFIG))
    again = shlex.quote(f"{folder}-again")
    return f"{program()} --config {config} --output-dir {again}"
