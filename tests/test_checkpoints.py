"""Whole or not there: every kind of damage is found and named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmssl import checkpoints
from lmssl.checkpoints import Damaged, newest, publish, rotate, seal, verify
from lmssl.errors import UserError


def make(root, step, value=1.0):
    stage = root / f".staging-{step}" / f"checkpoint-{step}"
    stage.mkdir(parents=True)
    save_file({"w": torch.full((50,), value)}, stage / "model.safetensors")
    (stage / "trainer_state.json").write_text("{}")
    seal(stage, {"step": step})
    publish(stage, root / f"checkpoint-{step}")
    return root / f"checkpoint-{step}"


DAMAGE = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "one bit": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", checkpoints.MANIFEST])
def test_damage_is_found_and_the_older_one_taken(tmp_path, name, kind):
    make(tmp_path, 1)
    DAMAGE[kind](make(tmp_path, 2) / name)
    with pytest.raises(Damaged, match=name):
        verify(tmp_path / "checkpoint-2")
    path, manifest, rejected = newest(tmp_path)
    assert (path.name, manifest["step"], len(rejected)) == ("checkpoint-1", 1, 1)
    assert name in rejected[0]


def test_a_checkpoint_under_another_name_is_none(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "checkpoint-5")
    with pytest.raises(Damaged, match="is of step 1"):
        verify(tmp_path / "checkpoint-5")


def test_weights_that_are_none_of_the_model_s_are_named(tmp_path):
    with pytest.raises(Damaged, match="none of the model's"):
        checkpoints.fits(make(tmp_path, 1), {}, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """A disk's error, too, is damage, behind which an older checkpoint may be whole."""
    make(tmp_path, 1)
    make(tmp_path, 2)
    original = checkpoints.sha256

    def broken(path):
        if path.parent.name == "checkpoint-2" and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(checkpoints, "sha256", broken)
    path, _, rejected = newest(tmp_path)
    assert path.name == "checkpoint-1"
    assert rejected == ["checkpoint-2/model.safetensors cannot be read: [Errno 5] Input/output error"]


def test_a_file_that_a_checkpoint_does_not_know_is_none_of_it(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "adapter.safetensors").write_bytes(b"")
    verify(folder)
    checkpoints.fits(folder, {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}, {})


def test_non_finite_weights(tmp_path):
    make(tmp_path, 1, float("nan"))
    with pytest.raises(Damaged, match="weight w is not finite"):
        verify(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        newest(tmp_path)


def test_none_at_all(tmp_path):
    assert newest(tmp_path)[0] is None
    assert newest(tmp_path / "nowhere")[0] is None


def test_publish_replaces(tmp_path):
    make(tmp_path, 3, 1.0)
    make(tmp_path, 3, 2.0)
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors")["w"][0] == 2.0
    verify(tmp_path / "checkpoint-3")
    assert not list(tmp_path.glob(".old-*"))


def test_a_file_that_another_rank_is_writing_is_hashed_when_it_is_whole(tmp_path):
    stage = tmp_path / ".staging-1" / "checkpoint-1"
    stage.mkdir(parents=True)
    save_file({"w": torch.ones(50)}, stage / "model.safetensors")
    (stage / "rng_state_1.pth").write_bytes(b"half")
    hashes = checkpoints.Hashes()
    hashes.begin(stage, "*.safetensors")
    (stage / "rng_state_1.pth").write_bytes(b"half and the rest")
    seal(stage, {"step": 1}, hashes)
    verify(stage)


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    rotate(tmp_path, set())
    assert {p.name for p in checkpoints.all_of(tmp_path)} == {"checkpoint-4", "checkpoint-3", "checkpoint-2"}
    assert newest(tmp_path)[0].name == "checkpoint-3"
