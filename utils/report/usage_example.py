"""How an exported student is used, in Python and without this project: for its model card and for the report."""

from collections.abc import Mapping
from typing import Any

_CODE = """\
{imports}

folder = {folder}
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
{inputs}
print(tokenizer.decode({written}))"""

_STOPS = "model.generation_config = GenerationConfig.from_pretrained(folder)  # not that of the base\n"
_TEXT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=50)[0]"""
_MESSAGES = """
messages = [{"role": "user", "content": "Tell me a story."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=50)[0]"""


def is_adapter(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings exports a LoRA adapter alone, and not a whole model."""
    lora = (settings.get("student") or {}).get("lora") or {}
    return bool(lora.get("enabled") and not lora.get("merge"))


def pipeline_tag(results: Mapping[str, Any]) -> str:
    """What the hub calls the task of such a student."""
    return "text2text-generation" if results["student"].get("encoder_decoder") else "text-generation"


def how_to_use(folder: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Code that loads the student and lets it write: on from a text, or, where it learned from conversations or
    examples, an answer to a prompt as it read them in training.

    Args:
        folder: where the student lies, as an expression of Python.
        settings: of the run, nested.
        results: see `utils.report.results`.
    """
    encoder, adapter = results["student"].get("encoder_decoder"), is_adapter(settings)
    loader = f"Auto{'Peft' * adapter}ModelFor{'Seq2SeqLM' if encoder else 'CausalLM'}"
    imports = f"from transformers import {loader}, AutoTokenizer"
    if adapter:
        imports = f"from peft import {loader}\nfrom transformers import AutoTokenizer, GenerationConfig"
    written = "written"
    if encoder:
        written += ", skip_special_tokens=True"
    elif results.get("prompted"):
        written += '[inputs["input_ids"].shape[1] :], skip_special_tokens=True'
    inputs = _STOPS * adapter + (_MESSAGES if results.get("prompted") and not encoder else _TEXT)
    return _CODE.format(imports=imports, folder=folder, loader=loader, inputs=inputs, written=written)
