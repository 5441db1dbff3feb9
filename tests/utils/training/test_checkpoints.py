"""Checkpoints are whole or rejected by name, and belong to one run."""

import json
import logging
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch

from utils.errors import RunError, UserError
from utils.training import checkpoint_files, checkpoints
from utils.training.checkpoint_files import verify
from utils.training.checkpoints import CheckpointStore


def content(step: int) -> dict:
    weight = torch.full((3, 2), float(step))
    return {
        "tensors": {"module": {"embed": weight, "head": weight, "bias": torch.arange(2, dtype=torch.float64)}},
        "objects": {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"betas": (0.9, 0.95)}]}},
        "state": {"step": step, "ratio": 0.1, "nothing": None, "odd": float("nan")},
    }


def filled(tmp_path, steps=(1, 2, 3), keep=10, **options) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep, **options)
    for step in steps:
        store.save(step, **content(step))
    return CheckpointStore(store.folder, keep, **options)


def test_what_is_saved_comes_back(tmp_path):
    store = filled(tmp_path, [7])
    loaded = store.load(store.newest_whole())
    assert loaded.step == 7 and loaded.path.name == "step-00000007"
    assert loaded.state["ratio"] == 0.1 and loaded.state["nothing"] is None
    assert loaded.objects == content(7)["objects"]
    for name, tensor in content(7)["tensors"]["module"].items():
        assert torch.equal(loaded.tensors["module"][name], tensor)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, bias=False), "b": torch.nn.Linear(64, 64, bias=False)})
    module["b"].weight = module["a"].weight
    base = torch.arange(12.0)
    group = module.state_dict() | {"row": base[:6].view(2, 3), "overlap": base[3:9], "turned": base.view(3, 4).T}
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors={"module": group, "none": {}}, objects={}, state={})
    assert (path / "module.safetensors").stat().st_size < 1.5 * 64 * 64 * 4
    loaded = store.load(path).tensors
    assert loaded["none"] == {}
    assert loaded["module"]["a.weight"] is loaded["module"]["b.weight"]
    assert loaded["module"].keys() == group.keys()
    assert all(torch.equal(loaded["module"][name], group[name]) for name in group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_survives(tmp_path, dtype):
    group = {
        "x": torch.arange(3).to(dtype),
        "empty": torch.empty(0, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    store = CheckpointStore(tmp_path)
    loaded = store.load(store.save(1, tensors={"g": group}, objects={}, state={})).tensors["g"]
    assert all(torch.equal(loaded[name], group[name]) and loaded[name].dtype == dtype for name in group)


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def cut(size):
    def damage(file):
        data = file.read_bytes()
        file.write_bytes(data[:size] if size != "half" else data[: len(data) // 2])

    return damage


FILES = ["module.safetensors", "optimizer.pt", "state.json", "manifest.json"]
DAMAGES = {"missing": os.remove, "flipped": flip, "empty": cut(0), "cut 5": cut(5), "half": cut("half"), "cut": cut(-1)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_falls_back_to_the_checkpoint_before_and_is_named(tmp_path, caplog, file, damage):
    store = filled(tmp_path)
    DAMAGES[damage](store.folder / "step-00000003" / file)
    if (file, damage) == ("manifest.json", "flipped"):  # in the middle lies a digest, or a name, or a size
        assert verify(store.folder / "step-00000003") is not None
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert store.newest_whole().name == "step-00000002"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "step-00000003" in warning
    assert file in warning or (file, damage) == ("manifest.json", "flipped")


def test_if_every_checkpoint_is_bad_each_is_listed_and_nothing_starts_afresh(tmp_path):
    store = filled(tmp_path)
    flip(store.folder / "step-00000001" / "module.safetensors")
    os.remove(store.folder / "step-00000002" / "manifest.json")
    cut(5)(store.folder / "step-00000003" / "optimizer.pt")
    with pytest.raises(UserError) as error:
        store.resume_point("auto")
    message = str(error.value)
    assert "step-00000001: module.safetensors does not match its sha256" in message
    assert "step-00000002: manifest.json is missing" in message
    assert "step-00000003: optimizer.pt has 5 bytes instead of" in message


def test_a_checkpoint_under_another_name_is_rejected(tmp_path):
    store = filled(tmp_path, [1])
    shutil.copytree(store.folder / "step-00000001", store.folder / "step-00000009")
    assert verify(store.folder / "step-00000009") == "the manifest is that of step 1"
    assert store.newest_whole().name == "step-00000001"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def test_code_in_a_pickle_is_refused_even_with_a_right_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = filled(tmp_path, [1])
    path = store.folder / "step-00000001"
    torch.save(Bomb(), tmp_path / "new style.pt")
    for bomb in ((tmp_path / "new style.pt").read_bytes(), pickle.dumps(Bomb(), protocol=2)):
        (path / "optimizer.pt").write_bytes(bomb)
        (path / "manifest.json").unlink()
        checkpoint_files.write_manifest(path, 1)
        with pytest.raises(UserError, match="cannot be used"):
            CheckpointStore(store.folder).load(path)
    assert not (tmp_path / "EXECUTED").exists()


def test_a_save_that_raises_leaves_no_trace(tmp_path):
    store = filled(tmp_path, [1])

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        store.save(2, tensors={"module": {"w": torch.ones(2)}}, objects={"optimizer": Unpicklable()}, state={})
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001"]
    assert verify(store.newest_whole()) is None


def test_other_folders_and_leftovers_do_not_count(tmp_path):
    store = filled(tmp_path, [1])
    for name in (".ipynb_checkpoints", "step-x", "step-3", ".staging-step-00000004-abc"):
        (store.folder / name).mkdir()
    assert list(store.steps()) == [1]
    assert store.resume_point("auto").name == "step-00000001"
    assert not (store.folder / ".staging-step-00000004-abc").exists()
    assert (store.folder / ".ipynb_checkpoints").exists()


@pytest.fixture
def small_files():
    """A function that lets no file of this process grow beyond so many bytes: writing more fails as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of a process exist on POSIX systems")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("large", ["module", "optimizer"])
def test_a_disk_that_fills_up_in_the_middle_of_a_save_is_told_and_the_checkpoint_before_stays(
    tmp_path, small_files, large
):
    store = filled(tmp_path, [1])
    weights = {name: torch.ones(100_000 if name == large else 1) for name in ("module", "optimizer")}
    small_files(200_000)
    with pytest.raises(RunError, match=r"step-00000002 .* It needs 1\.4 MB, .* MB are free\. step-00000001 is kept"):
        store.save(2, tensors={"w": {"x": weights["module"]}}, objects={"o": [weights["optimizer"]]}, state={})
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert verify(store.newest_whole()) is None


def test_too_little_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    store = filled(tmp_path, [1])
    monkeypatch.setattr(checkpoints, "atomic_folder", lambda _: pytest.fail("it began to write"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(RunError, match=r"too little disk. It needs 5\.0 MB, 2\.0 MB are free\. step-00000001 is kept"):
        store.save(2, tensors={"w": {"x": torch.ones(500_000)}}, objects={"o": {"a": (torch.ones(500_000),)}}, state={})


# --- pruning --------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_protected_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, **content(step), protect=[2])
    assert list(store.steps()) == [6, 5, 2]
    store.save(7, **content(7), protect=[6])
    assert list(store.steps()) == [7, 6]


def test_nothing_is_pruned_before_the_new_one_is_whole(tmp_path, monkeypatch):
    store = filled(tmp_path, [1], keep=1)
    monkeypatch.setattr(checkpoint_files, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunError, match="disk full"):
        store.save(2, **content(2))
    assert list(store.steps()) == [1] and verify(store.newest_whole()) is None


def test_a_removal_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, **content(1))
    monkeypatch.setattr(checkpoints, "remove_folder", lambda *_: (_ for _ in ()).throw(OSError("busy")))
    store.save(2, **content(2))
    assert "could not be removed: busy" in caplog.text
    monkeypatch.undo()
    store.save(3, **content(3))
    assert list(store.steps()) == [3]


def test_a_damaged_newer_one_goes_when_the_run_has_passed_on(tmp_path):
    store = filled(tmp_path, [1, 2, 3], keep=2)
    flip(store.folder / "step-00000003" / "state.json")
    assert store.newest_whole().name == "step-00000002"
    store.save(3, **content(3))
    assert list(store.steps()) == [3, 2] and verify(store.folder / "step-00000003") is None


# --- resume ---------------------------------------------------------------------------------------------------------


def test_auto_starts_afresh_in_an_empty_place(tmp_path):
    assert CheckpointStore(tmp_path / "none").resume_point("auto") is None
    assert CheckpointStore(tmp_path / "none").resume_point("never") is None


def test_never_refuses_to_mix_two_runs(tmp_path):
    with pytest.raises(UserError, match=r"up to step 3[\s\S]*--output-dir[\s\S]*--resume auto"):
        filled(tmp_path).resume_point("never")


@pytest.mark.parametrize("place", ["run/checkpoints/step-00000002", "run/checkpoints", "run"])
def test_a_path_may_be_a_checkpoint_a_folder_of_them_or_a_run(tmp_path, place):
    filled(tmp_path / "run", [1, 2])
    store = CheckpointStore(tmp_path / "new" / "checkpoints")
    assert store.resume_point(str(tmp_path / place)).name == "step-00000002"


def test_a_copied_checkpoint_may_have_another_name(tmp_path):
    shutil.copytree(filled(tmp_path, [5]).folder / "step-00000005", tmp_path / "attached")
    store = CheckpointStore(tmp_path / "new")
    assert store.load(store.resume_point(str(tmp_path / "attached"))).step == 5


def test_a_path_with_nothing_or_damage_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing"):
        with pytest.raises(UserError, match="no checkpoint there"):
            store.resume_point(str(tmp_path / path))
    other = filled(tmp_path / "run", [1])
    flip(other.folder / "step-00000001" / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer\.pt does not match"):
        store.resume_point(str(other.folder / "step-00000001"))


def test_another_runs_checkpoint_is_refused_beside_own_ones(tmp_path):
    other, own = filled(tmp_path / "other", [9]), filled(tmp_path / "own", [1, 2])
    with pytest.raises(UserError, match="checkpoints of its own"):
        own.resume_point(str(other.folder / "step-00000009"))
    assert own.resume_point(str(own.folder / "step-00000001")).name == "step-00000001"


def test_a_run_with_other_settings_is_refused_and_every_difference_is_listed(tmp_path):
    saved = {"config": {"seed": 1, "loss": {"top_k": 64}}, "data": "abc", "gone": [1]}
    now = {"config": {"seed": 2, "loss": {"top_k": 64}}, "data": "abd", "new": None}
    filled(tmp_path, [1], fingerprint=saved)
    with pytest.raises(UserError) as error:
        CheckpointStore(tmp_path / "checkpoints", fingerprint=now).resume_point("auto")
    message = str(error.value)
    for line in ("config.seed: 1 -> 2", 'data: "abc" -> "abd"', "gone: [1] -> (absent)", "new: (absent) -> null"):
        assert line in message
    assert "top_k" not in message and "--output-dir" in message
    same = json.loads(json.dumps(saved))
    assert CheckpointStore(tmp_path / "checkpoints", fingerprint=same).resume_point("auto") is not None


def test_a_ramp_is_told_whole_and_beside_the_default_of_the_other_run(tmp_path):
    filled(tmp_path, [1], fingerprint={"curriculum.select": {"points": [[0, 0.2], [1, 1]], "shape": "linear"}})
    with pytest.raises(UserError, match=r'curriculum.select: {"points": \[\[0, 0.2], \[1, 1]].* -> 1.0'):
        CheckpointStore(tmp_path / "checkpoints", fingerprint={"data": "abc"}).resume_point("auto")


def test_resume_of_the_same_settings_as_tuples_and_lists_is_no_difference(tmp_path):
    filled(tmp_path, [1], fingerprint={"betas": (0.9, 0.95)})
    assert CheckpointStore(tmp_path / "checkpoints", fingerprint={"betas": [0.9, 0.95]}).resume_point() is not None
