"""Runs that are short, interrupted, continued, finished twice, or meet another run: nothing is lost or mixed up."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from runs import config, scalars, write_config, write_folder

from multidiff import MultiDiffPipeline
from multidiff.callbacks import AveragedWeights
from multidiff.checkpoints import Checkpoints, WholeFiles
from multidiff.cli import main
from multidiff.training import MaskedDiffusionModule


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("continuing") / "data")


def settings(folder, data, start_step=0, every=100, extra=(), **trainer):
    made = config(folder, **trainer)
    made["data"]["init_args"]["folder"] = str(data)
    _, save, average, checkpoints = made["trainer"]["callbacks"]
    average["init_args"] = {"decay": 0.9, "start_step": start_step}
    checkpoints["init_args"] = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": every, "save_top_k": 0}
    made["trainer"]["callbacks"] = [average, save, *extra, checkpoints]  # in another order than the configs have
    made["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    made["model"]["init_args"]["final_lr"] = 1.0  # or the learning rate would know where the run ends
    made["trainer"]["limit_val_batches"] = 1
    return made


def fit(folder, made, *more):
    folder.mkdir(parents=True, exist_ok=True)
    main(["fit", "--config", write_config(folder, made), *map(str, more)])


def read(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights(folder):
    return MultiDiffPipeline.from_pretrained(folder / "model").transformer.state_dict()


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


class AtStep(Callback):
    """Does something at the end of a step."""

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self._act(trainer)

    def on_validation_batch_end(self, trainer, *_):
        if self.what == "interrupt validation":
            raise KeyboardInterrupt

    def _act(self, trainer):
        if self.what == "stop":
            trainer.should_stop = True
        elif self.what == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)


def at_step(step, what):
    return {"class_path": "test_continuing.AtStep", "init_args": {"step": step, "what": what}}


def test_a_run_shorter_than_the_averaging_saves_what_it_trained(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, start_step=50, max_steps=6))
    last = read(tmp_path)
    live = {name: value for name, value in last["current_model_state"].items() if name.startswith("transformer.")}
    arguments = config(tmp_path)["model"]["init_args"]
    initial = MaskedDiffusionModule(arguments["tokenizers"], arguments["transformer"])
    name = "transformer.blocks.0.mlp.down.weight"
    assert not torch.equal(live[name], initial.state_dict()[name])
    assert same(live, last["state_dict"])
    assert torch.equal(weights(tmp_path)["blocks.0.mlp.down.weight"], live[name])


def test_the_average_follows_its_definition(data, tmp_path):
    """From step 3 on w ← 0.9 w + 0.1 live, before that the live weights."""
    made = settings(tmp_path, data, start_step=3, every=1, max_steps=6)
    made["trainer"]["callbacks"][-1]["init_args"] |= {
        "save_top_k": -1,
        "filename": "{step}",
        "auto_insert_metric_name": False,
    }
    fit(tmp_path, made)
    name, expected = "transformer.embed.weight", None
    for step in range(1, 7):
        checkpoint = read(tmp_path, str(step))
        live = checkpoint["current_model_state"][name].double()
        expected = live if step <= 3 else 0.9 * expected + 0.1 * live
        torch.testing.assert_close(checkpoint["state_dict"][name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("start_step", [0, 5])
def test_a_finished_run_that_is_continued_is_the_longer_run(data, tmp_path, start_step):
    fit(tmp_path / "whole", settings(tmp_path / "whole", data, start_step, max_steps=12))
    fit(tmp_path / "part", settings(tmp_path / "part", data, start_step, max_steps=7))
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "rest", settings(tmp_path / "rest", data, start_step, max_steps=12), "--ckpt_path", last)
    whole, rest = scalars(tmp_path / "whole")["loss"], scalars(tmp_path / "rest")["loss"]
    assert rest == {step: whole[step] for step in range(7, 12)}
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "rest"))


EVERY_SEVEN = {"val_check_interval": 7, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("ended_by", "trainer"),
    [
        ([at_step(7, "stop")], {"max_steps": 12}),
        ([at_step(7, "interrupt")], {"max_steps": 12}),
        ([at_step(7, "interrupt validation")], EVERY_SEVEN | {"max_steps": 12}),
        ([], {"max_steps": -1, "max_epochs": 2}),
    ],
    ids=["early stop", "Ctrl-C", "Ctrl-C in validation", "max_epochs"],
)  # fmt: skip
def test_a_stopped_run_goes_on_exactly(data, tmp_path, ended_by, trainer):
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = {key: value for key, value in trainer.items() if key not in ("max_steps", "max_epochs")}
    fit(whole, settings(whole, data, 3, max_steps=12, **more))
    interrupted = any("interrupt" in one["init_args"]["what"] for one in ended_by)
    with pytest.raises(SystemExit, match="1") if interrupted else nullcontext():
        fit(run, settings(run, data, 3, extra=ended_by, **trainer))
    assert (run / "model").exists() != interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read(run)["global_step"] == (10 if "max_epochs" in trainer else 7)
    fit(run, settings(run, data, 3, max_steps=12, **more), "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert same(weights(whole), weights(run))
    assert same(read(whole)["current_model_state"], read(run)["current_model_state"])
    assert [path.name for path in (run / "checkpoints").glob("last*")] == ["last.ckpt"]


def test_continuing_a_run_at_its_end_saves_the_same_model(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, max_steps=5))
    before, last = weights(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    content = read(tmp_path)["state_dict"]
    fit(tmp_path, settings(tmp_path, data, max_steps=5), "--ckpt_path", last)
    assert same(before, weights(tmp_path))
    assert same(content, read(tmp_path)["state_dict"])


def test_a_folder_with_another_run_is_refused_or_overwritten(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, every=5, max_steps=8))
    with pytest.raises(SystemExit, match=r"checkpoints holds the checkpoints of another run. Continue that run with"):
        fit(tmp_path, settings(tmp_path, data, max_steps=3))
    other = tmp_path / "other"
    fit(other, settings(other, data, max_steps=3))
    with pytest.raises(SystemExit, match="holds the checkpoints of another run"):
        fit(tmp_path, settings(tmp_path, data, max_steps=9), "--ckpt_path", other / "checkpoints" / "last.ckpt")
    assert read(tmp_path)["global_step"] == 8
    fit(tmp_path, settings(tmp_path, data, max_steps=3), "--overwrite", "true")
    assert read(tmp_path)["global_step"] == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_two_runs_at_once_are_refused(tmp_path):
    first, second = Checkpoints(str(tmp_path)), Checkpoints(str(tmp_path))
    first.claim(goes_on=False)
    with pytest.raises(ValueError, match="another training is writing to"):
        second.claim(goes_on=True)
    first._release()
    second.claim(goes_on=True)
    second._release()


def test_lightnings_own_average_is_refused(data, tmp_path):
    made = settings(tmp_path, data)
    made["trainer"]["callbacks"][0]["class_path"] = "lightning.pytorch.callbacks.EMAWeightAveraging"
    made["trainer"]["callbacks"][0]["init_args"] = {"decay": 0.9}
    with pytest.raises(SystemExit, match=r"Use multidiff\.callbacks\.AveragedWeights"):
        fit(tmp_path, made)
    with pytest.raises(ValueError, match=r"decay 1.0 must be in \[0, 1\)"):
        AveragedWeights(decay=1.0)


def test_a_checkpoint_needs_no_other_file_and_no_other_folder(data, tmp_path, monkeypatch):
    from multidiff_bpe import BPETokenizer

    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    BPETokenizer.train(["one two three"] * 3, 270).save(tmp_path / "run" / "bpe")
    made = settings(tmp_path / "run", data, max_steps=2)
    made["model"]["init_args"]["tokenizers"] = {"text": {"plugin": "bpe", "folder": "bpe"}, "shout": {"plugin": "bpe"}}
    fit(tmp_path / "run", made)
    alone = (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(tmp_path / "alone.ckpt")
    (tmp_path / "run" / "bpe").rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    pipeline = MultiDiffPipeline.from_pretrained(alone)
    assert pipeline.tokenizers["text"].codebook_sizes == BPETokenizer.load(tmp_path / "elsewhere").codebook_sizes
    checkpoint = torch.load(alone, weights_only=True)
    checkpoint["multidiff"]["tokenizers"]["text"] = {"../../x": torch.zeros(1, dtype=torch.uint8)}
    torch.save(checkpoint, alone)
    with pytest.raises(ValueError, match=r"alone.ckpt: its tokenizer 'text' .*'../../x' lies outside of its folder"):
        MultiDiffPipeline.from_pretrained(alone)


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, max_steps=2))
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit, match=r"last\.ckpt is truncated, damaged"):
            main([command, "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(last)])
    with pytest.raises(SystemExit, match=r"no\.ckpt is missing"):
        main(["fit", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(tmp_path / "checkpoints/no.ckpt")])


def test_checkpoints_are_whole_wherever_temporary_files_lie(tmp_path):
    """Killed at any moment, also with TMPDIR on another file system, the file is the old one or the new one."""
    code = (
        "import sys, torch; from multidiff.checkpoints import WholeFiles\n"
        "content = {'weight': torch.zeros(2**22)}\n"
        "while True: WholeFiles().save_checkpoint(content, sys.argv[1]); print(1, flush=True)"
    )
    path = tmp_path / "last.ckpt"
    environment = {**os.environ, "TMPDIR": "/dev/shm"}
    before = set(os.listdir("/dev/shm"))
    for delay in (0.0, 0.011, 0.023, 0.037):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        threading.Event().wait(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        assert torch.load(path, weights_only=True)["weight"].shape == (2**22,)
    assert set(os.listdir("/dev/shm")) == before
    WholeFiles().save_checkpoint({}, path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be written"):
        WholeFiles().save_checkpoint({}, tmp_path / "file" / "a.ckpt")
