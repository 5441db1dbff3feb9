"""Tasks of lm_eval: what cannot be measured is told before the run, and what fails costs one column."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from tests.models.tiny import byte_bpe, tiny_llama
from utils.config.settings import EvaluationConfig
from utils.errors import UserError
from utils.evaluation import lm_eval_tasks


def test_names_may_be_given_with_commas_and_count_once():
    assert lm_eval_tasks.names(EvaluationConfig(tasks=["a,b", "c", "a"])) == ["a", "b", "c"]


def test_a_run_without_tasks_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lm_eval_tasks.check(EvaluationConfig())
    with pytest.raises(UserError, match=r"--eval-tasks needs lm_eval.*pip install '\.\[eval\]'"):
        lm_eval_tasks.check(EvaluationConfig(tasks=["a"]))


class TestWithLmEval:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e .[eval]")

    @pytest.fixture
    def config(self, tmp_path) -> EvaluationConfig:
        """A task on what the models make of a text."""
        (tmp_path / "rows.jsonl").write_text('{"text": "One day a girl found a stone."}\n' * 3, encoding="utf-8")
        task = {
            "task": "read_it",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
        (tmp_path / "read_it.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        return EvaluationConfig(tasks=["read_it"], tasks_path=str(tmp_path))

    def test_an_unknown_task_is_told(self, config):
        with pytest.raises(UserError, match=r"lm_eval has no raed_it\. `lm_eval ls tasks` lists"):
            lm_eval_tasks.check(EvaluationConfig(tasks=["read_it", "raed_it"], tasks_path=config.tasks_path))
        lm_eval_tasks.check(config)

    def test_documents_that_cannot_be_reached_are_told(self, config, tmp_path):
        (tmp_path / "rows.jsonl").unlink()
        with pytest.raises(UserError, match="read_it cannot be loaded"):
            lm_eval_tasks.check(config)

    def test_a_folder_without_tasks_is_told(self, tmp_path):
        with pytest.raises(UserError, match="no task there"):
            lm_eval_tasks.check(EvaluationConfig(tasks=["read_it"], tasks_path=str(tmp_path / "nothing")))

    def test_the_measure_is_that_of_the_model(self, config, capfd):
        """Bits per byte of a model that predicts evenly: log2 of its vocabulary, for each token."""
        tokenizer, model = byte_bpe(280), tiny_llama(280)
        nn.init.zeros_(model.get_output_embeddings().weight)
        (row,) = self.measure(config, {"student": lambda: model}, tokenizer)
        text = "One day a girl found a stone."
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        expected = tokens * torch.log2(torch.tensor(280.0)).item() / len(text)
        assert row["student"]["value"] == pytest.approx(expected, rel=1e-5)
        assert (row["task"], row["metric"], row["higher_is_better"], row["documents"]) == (
            "read_it",
            "bits_per_byte",
            False,
            3,
        )
        assert "it/s" not in capfd.readouterr().err  # bars fill the log of a saved notebook

    def test_a_model_that_fails_costs_its_column(self, config, caplog):
        def broken():
            raise RuntimeError("out of memory, say")

        with caplog.at_level(logging.ERROR):
            (row,) = self.measure(config, {"student": lambda: tiny_llama(280), "teacher": broken}, byte_bpe(280))
        assert "student" in row and "teacher" not in row and "out of memory, say" in caplog.text

    @staticmethod
    def measure(config, models, tokenizer):
        tokenizers = {"student": tokenizer, "teacher": tokenizer}
        return lm_eval_tasks.measure(SimpleNamespace(config=config, tokenizers=tokenizers, batch_size=2), models)
