"""The card of an exported student: read by the hub's own client, and telling nobody where its folders lay."""

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.models.tiny import byte_bpe, tiny_llama
from utils.pretrained.export import export
from utils.report.model_card import model_card

SCORES = {"bits_per_byte": 1.25, "perplexity": 30.5}
RESULTS = {
    "student": SCORES,
    "initial_student": {"bits_per_byte": 2.5, "perplexity": 900.0},
    "teacher": {"bits_per_byte": 1.0, "perplexity": 12.0},
    "baseline": {"bits_per_byte": 1.5, "perplexity": 41.0},
    "run": {"steps": 1234, "seconds": 5.0, "stopped_by": "finished"},
    "tasks": [
        {
            "task": "arc_easy",
            "metric": "acc",
            "higher_is_better": True,
            "documents": 2376,
            "teacher": {"value": 0.75, "stderr": 0.01},
            "student": {"value": 0.5, "stderr": None},
        }
    ],
}


def settings(student="owner/small", teacher="owner/large", text=("owner/text:plain",), init="pretrained", **lora):
    return {
        "student": {"name": student, "init": init, "lora": {"enabled": False, "merge": False, "rank": 8, **lora}},
        "teacher": {"name": teacher},
        "data": {"train": list(text)},
        "curriculum": {"kd": {"weight": 0.7}, "feat": {"weight": 0}, "lm": {"weight": {"points": [[0, 1], [1, 0.3]]}}},
        "loss": {"temperature": 1.0, "top_k": 256},
        "cache": {"folder": None, "top_k": 64},
        "training": {"learning_rate": 3e-4},
    }


def test_the_hub_reads_its_header():
    data = ModelCard(model_card(settings(), RESULTS)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "text-generation")
    assert (data.base_model, data.datasets, data.tags) == ("owner/small", ["owner/text"], ["knowledge-distillation"])


def test_it_tells_teacher_text_recipe_and_what_was_measured():
    card = model_card(settings(), RESULTS)
    for told in ("`owner/large`", "`owner/text:plain`", "1,234 optimizer steps", "its own weights", "1.2500", "30.50"):
        assert told in card
    for row in (
        "| Teacher | 1.0000 |",
        "| Same student without the teacher | 1.5000 |",
        "| arc_easy | acc ↑ | 2,376 |",
    ):
        assert row in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["curriculum"] == {"kd": {"weight": 0.7}, "lm": {"weight": {"points": [[0, 1], [1, 0.3]]}}}
    assert recipe["training"] == {"learning_rate": 3e-4} and recipe["loss"] == {"temperature": 1.0, "top_k": 256}


def test_behind_a_cache_the_recipe_tells_how_many_tokens_it_keeps():
    cached = settings() | {"cache": {"folder": "some/cache", "top_k": 64}}
    recipe = yaml.safe_load(model_card(cached, RESULTS).partition("```yaml\n")[2].partition("```")[0])
    assert recipe["loss"] == {"temperature": 1.0, "top_k": 64}


def test_nobody_learns_where_folders_lay(tmp_path):
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.jsonl").touch()
    names = [str(tmp_path / name) for name in ("small", "large", "text.jsonl")]
    card = model_card(settings(names[0], names[1], names[2:]), RESULTS)
    assert str(tmp_path) not in card and "`small`" in card and "`large`" in card and "`text.jsonl`" in card
    data = ModelCard(card).data
    assert data.base_model is None and data.datasets is None


def test_random_weights_come_from_no_base_model_and_the_embedded_text_is_not_on_the_hub():
    data = ModelCard(model_card(settings(init="random", text=["quickstart"]), RESULTS)).data
    assert data.base_model is None and data.datasets is None
    assert ModelCard(model_card(settings(teacher=None), RESULTS)).data.tags is None


@pytest.mark.parametrize(("encoder", "task"), [(False, "text-generation"), (True, "text2text-generation")])
def test_the_hub_learns_the_task(encoder, task):
    results = RESULTS | {"student": SCORES | {"encoder_decoder": encoder}}
    assert ModelCard(model_card(settings(), results)).data.pipeline_tag == task


@pytest.mark.parametrize(("merge", "library"), [(False, "peft"), (True, "transformers")])
def test_an_adapter_says_what_it_adapts(merge, library):
    card = model_card(settings(enabled=True, merge=merge), RESULTS)
    data = ModelCard(card).data
    assert data.library_name == library and data.base_model == "owner/small"
    assert ("AutoPeftModelForCausalLM.from_pretrained" in card) is not merge and "rank: 8" in card


def test_the_hubs_index_has_the_results():
    results = ModelCard(model_card(settings() | {"output_dir": "runs/first"}, RESULTS)).data
    assert results.model_name == "first"
    measured = [(one.dataset_name, one.metric_type, one.metric_value) for one in results.eval_results]
    assert measured == [("held-out text of owner/text:plain", "bits_per_byte", 1.25), ("arc_easy", "acc", 0.5)]
    assert {one.task_type for one in results.eval_results} == {"text-generation"}


def test_a_base_in_the_hubs_cache_is_called_by_its_hub_id(tmp_path):
    snapshot = tmp_path / "models--owner--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    card = model_card(settings(str(snapshot), enabled=True), RESULTS)
    assert ModelCard(card).data.base_model == "owner/small" and "A LoRA adapter of `owner/small`." in card
    assert "pretrained=owner/small,peft=path/to/this/folder" in card and str(tmp_path) not in card


def test_a_student_that_got_worse_is_called_worse_in_its_card():
    worse = RESULTS | {"student": {"bits_per_byte": 2.6, "perplexity": 1.0}, "retention": {"gap_closed": -0.1}}
    card = model_card(settings(), worse)
    assert "got worse: 2.6000 bits per byte on unseen text, 2.5000 before training" in card and "closed" not in card


def test_it_is_where_the_hub_looks(tmp_path):
    export(tiny_llama(280), byte_bpe(280), tmp_path / "student", model_card(settings(), RESULTS))
    assert ModelCard.load(tmp_path / "student" / "README.md").data.base_model == "owner/small"
