"""An attached model is found by its name and never another one; what is no model is told what it is."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_llama
from utils.errors import UserError
from utils.pretrained import loading, locate, model_folders
from utils.pretrained.model_folders import attached, words

KAGGLE = (
    "qwen2.5/transformers/0.5b/1",
    "qwen2.5/transformers/1.5b/1",
    "qwen2.5/transformers/1.5b-instruct/1",
    "models/meta-llama/llama-3.2/transformers/1b/2",
    "models/google/gemma-3/transformers/gemma-3-1b-it/1",
    "models/google/gemma-3/keras/gemma-3-1b-it/1",
    "gpt2/pytorch/default/1",
    "my-upload/SmolLM-135M",
)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A notebook's attached models, empty but for their config.json."""
    for path in KAGGLE:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "config.json").write_text("{}")
    monkeypatch.setattr(locate, "ATTACHED", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Qwen/Qwen2.5-1.5B", "qwen2.5/transformers/1.5b/1"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5/transformers/1.5b-instruct/1"),
        ("qwen2.5-0.5b", "qwen2.5/transformers/0.5b/1"),
        ("meta-llama/Llama-3.2-1B", "models/meta-llama/llama-3.2/transformers/1b/2"),
        ("llama-3.2", "models/meta-llama/llama-3.2/transformers/1b/2"),
        ("google/gemma-3-1b-it", "models/google/gemma-3/transformers/gemma-3-1b-it/1"),
        ("gpt2", "gpt2/pytorch/default/1"),
        ("openai-community/gpt2", "gpt2/pytorch/default/1"),
        ("HuggingFaceTB/SmolLM-135M", "my-upload/SmolLM-135M"),
    ],
)
def test_a_name_of_the_hub_stands_for_the_attached_model(inputs, name, path):
    assert locate.locate(name, "teacher") == str(inputs / path)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-1.5B-Math",
        "google/gemma-3-1b-pt",
        "Qwen/Qwen2-1.5B",
        "qwen2.5-5b",
        "gemma-3-1b",
    ],
)
def test_another_size_or_variation_is_never_taken(inputs, name):
    assert attached(name, inputs) == [] and locate.locate(name, "teacher") == name


def test_a_name_that_fits_several_is_refused_with_all_of_them(inputs):
    with pytest.raises(UserError, match=r"3 attached models have that name.*give its folder") as raised:
        locate.locate("qwen2.5", "teacher")
    assert all(str(inputs / path) in str(raised.value) for path in KAGGLE[:3])


def test_one_variation_alone_is_what_the_models_name_means(inputs):
    for path in KAGGLE[1:3]:
        (inputs / path / "config.json").unlink()
    assert locate.locate("qwen2.5", "teacher") == str(inputs / KAGGLE[0])


def test_two_versions_are_told_apart_by_the_user(inputs):
    newer = inputs / "qwen2.5/transformers/1.5b/2"
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    with pytest.raises(UserError, match="2 attached models"):
        locate.locate("Qwen/Qwen2.5-1.5B", "teacher")


def test_of_two_owners_the_one_that_is_named_is_taken(tmp_path):
    for owner in ("own", "other"):
        (tmp_path / owner / "small").mkdir(parents=True)
        (tmp_path / owner / "small" / "config.json").write_text("{}")
    assert attached("own/small", tmp_path) == [tmp_path / "own" / "small"]
    assert len(attached("third/small", tmp_path)) == 2


def test_numbers_are_words_of_their_own():
    assert words("Qwen2.5_1.5B-Instruct") == ("qwen", "2.5", "1.5", "b", "instruct")
    assert words("model-1-5b") != words("model-1.5b")


# ------------------------------------------------------------------------- folders that are no models


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["manifest.json", "state.json", "module.safetensors"], "This is a checkpoint.*--resume"),
        (["metrics.jsonl", "config.yaml"], "folder of a run that has not exported its student"),
        (["model_index.json"], "diffusers"),
        (["model-Q4_K_M.gguf"], r"llama\.cpp \(GGUF\).*:FILE\.gguf"),
        (["global_step12"], "DeepSpeed.*zero_to_fp32"),
        (["params.json", "consolidated.00.pth"], "format of their makers"),
        (["model.onnx"], "ONNX"),
        (["tokenizer.json"], "a tokenizer without a model"),
        (["model.safetensors"], "without a config.json"),
        ([], "It holds: nothing"),
    ],
)
def test_a_folder_without_a_model_says_what_it_is_and_the_way(tmp_path, files, says):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"(?s)student .*holds no models.*{says}"):
        locate.locate(str(tmp_path), "student")


def test_the_folder_of_a_run_stands_for_its_student(tmp_path):
    for path in ("student", "checkpoints/step-00000002"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "student" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("")
    assert locate.locate(str(tmp_path), "student") == str(tmp_path / "student")


def test_a_file_is_answered_with_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=f"Give the folder that it lies in: {tmp_path}"):
        locate.locate(str(tmp_path / "model.safetensors"), "teacher")


def test_a_model_of_vectors_and_weights_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        locate.locate(str(tmp_path), "teacher")
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(UserError, match="sentence-transformers"):
        locate.locate(str(tmp_path), "teacher")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.json", "tokenizer.model"])
def test_any_file_of_a_model_that_git_has_not_fetched_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(UserError, match=rf"{name} only points .* `git lfs pull`"):
        locate.locate(str(tmp_path), "teacher")


def test_models_inside_a_model_are_no_further_models(tmp_path):
    for path in (tmp_path / "model", tmp_path / "model" / "checkpoint-10"):
        path.mkdir()
        (path / "config.json").write_text("{}")
    assert locate.locate(str(tmp_path), "teacher") == str(tmp_path / "model")


def test_a_model_is_not_looked_for_on_a_whole_disk(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / f"{number}").mkdir()
    (tmp_path / "5" / "config.json").write_text("{}")
    assert locate.locate(str(tmp_path), "student") == str(tmp_path / "5")

    monkeypatch.setattr(model_folders, "MOST_FOLDERS", 3)
    with pytest.raises(UserError, match="more than 3 folders are below it"):
        locate.locate(str(tmp_path), "student")


def tiny_model(folder: Path) -> Path:
    tiny_llama(40).save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["openvino_model.xml", "openvino_model.bin"], "OpenVINO.*exported from"),
        (["tf_model.h5", "training_args.bin"], "TensorFlow's only.*from_tf=True"),
        (["flax_model.msgpack"], "Flax's only.*from_flax=True"),
        (["model-Q4_K_M.gguf"], r"llama\.cpp.*FOLDER:FILE\.gguf"),
        (["onnx/model.onnx"], "ONNX Runtime.*exported from"),
    ],
)
def test_weights_of_another_library_are_named_with_the_way(files, says, role, tmp_path):
    tiny_model(tmp_path).unlink()
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"abc")
    with pytest.raises(UserError, match=rf"(?s){role} .*{says}") as raised:
        loading.load_model(str(tmp_path), role, torch.float32)
    assert "--student-init random" not in str(raised.value) and "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_off_are_to_be_downloaded_again(share, tmp_path):
    file = tiny_model(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off or damaged.*hf download") as raised:
        loading.load_model(str(tmp_path), "student", torch.float32)
    assert "--student-init random" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 1])
def test_missing_files_of_weights_are_named(kept, tmp_path):
    tiny_llama(40).save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and loading.load_model(str(tmp_path), "student", torch.float32)
    for shard in shards[kept:]:
        shard.unlink()
    missing = len(shards) - kept
    says = f"{missing} of the {len(shards)} files of its weights are missing: {shards[kept].name}.*hf download"
    with pytest.raises(UserError, match=says) as raised:
        loading.load_model(str(tmp_path), "student", torch.float32)
    assert "--student-init random" not in str(raised.value)


def test_weights_that_mlx_quantised_are_named(tmp_path):
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(UserError, match=r"quantised by MLX.*converted from"):
        loading.load_model(str(tmp_path), "teacher", torch.float32)


def test_a_model_for_ctranslate2_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "model.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"CTranslate2.*converted from"):
        locate.locate(str(tmp_path), "student")


def test_a_random_start_is_advised_where_there_are_no_weights_at_all(tmp_path):
    tiny_model(tmp_path).unlink()
    (tmp_path / "training_args.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="--student-init random"):
        loading.load_model(str(tmp_path), "student", torch.float32)
