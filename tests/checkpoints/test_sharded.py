"""Checkpoints of sharded trainings, read by a process alone: the model in them, damage, and code that does not run."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from multidiff import MultiDiffPipeline
from multidiff.checkpoints import check_checkpoint
from multidiff.checkpoints.sharded import META, read_checkpoint, read_into, read_whole, shapes
from multidiff.training import MaskedDiffusionModule

TOKENIZERS = {"text": {"plugin": "bpe"}}
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def weights():
    module = MaskedDiffusionModule(TOKENIZERS, SMALL)
    module.configure_model()
    return module.state_dict()


@pytest.fixture
def checkpoint(weights, tmp_path):
    """What a strategy writes of a small model, as a single process writes it."""
    content = {"optimizer_states": [{"param_groups": [{"lr": 0.5, "params": ["b.weight", "a"]}]}]}
    MaskedDiffusionModule(TOKENIZERS, SMALL).on_save_checkpoint(content)
    states = {
        "a": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)},
        "b.weight": {"momentum_buffer": torch.ones(4)},
    }
    path = tmp_path / "last.ckpt"
    write({"state_dict": weights, "optimizer_0": states}, path)
    torch.save(content, path / META)
    return path


def write(tensors, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(tensors, checkpoint_id=path, no_dist=True)


def test_a_model_is_read_from_shards(checkpoint, weights):
    read = MultiDiffPipeline.from_pretrained(checkpoint).transformer.state_dict()
    assert read.keys() == {name.removeprefix("transformer.") for name in weights}
    assert all(torch.equal(weights[f"transformer.{name}"], weight) for name, weight in read.items())
    assert shapes(checkpoint, "current_model_state") == {}
    with pytest.raises(ValueError, match="holds no current_model_state"):
        read_whole(checkpoint, "current_model_state")


def test_optimizer_states_become_those_of_a_file(checkpoint):
    """PyTorch numbers weights in the order of their groups."""
    (state,) = read_checkpoint(checkpoint)["optimizer_states"]
    assert state["param_groups"] == [{"lr": 0.5, "params": [0, 1]}]
    assert state["state"].keys() == {0, 1}
    assert torch.equal(state["state"][0]["momentum_buffer"], torch.ones(4))
    assert state["state"][1]["step"] == 3


@pytest.mark.parametrize(
    "wrong", [{"transformer.embed.weight": torch.zeros(3, 16)}, {"transformer.nothing": torch.zeros(3)}]
)
def test_tensors_must_be_there_in_their_shape(checkpoint, wrong):
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or incomplete \("):
        read_into(checkpoint, {"state_dict": wrong})


@pytest.mark.parametrize("name", [META, ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_damage_is_a_sentence(checkpoint, name, damage):
    file = checkpoint / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=r"last\.ckpt") as caught:
        MultiDiffPipeline.from_pretrained(checkpoint)
    assert "\n" not in str(caught.value)
    if damage == "removed" and name != "__0_0.distcp":
        with pytest.raises(ValueError, match=r"last\.ckpt"):
            check_checkpoint(checkpoint)


class Touch:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", [META, ".metadata"])
def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path, name):
    mark = tmp_path / "mark"
    content = pickle.dumps(Touch(str(mark)))
    pickle.loads(content)
    assert mark.exists()  # so it would
    mark.unlink()
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        MultiDiffPipeline.from_pretrained(checkpoint)
    assert not mark.exists()


def test_what_torch_would_unpickle_is_refused(tmp_path):
    """Objects other than tensors are bytes in a checkpoint of PyTorch, which it unpickles."""
    write({"state_dict": {"a": torch.zeros(2), "b": [3]}}, tmp_path / "a.ckpt")
    torch.save({}, tmp_path / "a.ckpt" / META)
    with pytest.raises(ValueError, match=r"\.metadata is damaged \(state_dict\.b.* is no tensor\)"):
        read_whole(tmp_path / "a.ckpt", "state_dict")
