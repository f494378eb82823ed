"""Runs that are short, interrupted, continued, finished twice, or meet another run: nothing is lost or mixed up."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from random import Random
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from multidiff import MultiDiffPipeline
from multidiff.cli import main
from multidiff.training.callbacks import AveragedWeights
from multidiff.training.checkpoints import Checkpoints, WholeFiles
from multidiff.training.module import MaskedDiffusionModule
from tests.helpers.runs import config, scalars, write_config, write_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("continuing") / "data")


def settings(folder, data, start_step=0, every=100, extra=(), **trainer):
    made = config(folder, **trainer)
    made["data"]["init_args"]["source"] = str(data)
    _, save, average, checkpoints = made["trainer"]["callbacks"]
    average["init_args"] = {"decay": 0.9, "start_step": start_step}
    checkpoints["init_args"] = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": every, "save_top_k": 0}
    made["trainer"]["callbacks"] = [average, save, *extra, checkpoints]  # in another order than the configs have
    made["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    made["model"]["init_args"]["min_lr_ratio"] = 1.0  # or the learning rate would know where the run ends
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
    """Does something in or after a step of training."""

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and trainer.fit_loop._should_accumulate() is False:
            if self.what == "Ctrl-C before a step":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.what == "error":
                raise RuntimeError("an error in a step")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            if self.what == "stop":
                trainer.should_stop = True
            elif self.what == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_index, *_):
        if self.what == "Ctrl-C in validation" and trainer.global_step == self.step and batch_index == 0:
            os.kill(os.getpid(), signal.SIGINT)


def at_step(step, what):
    return {"class_path": "tests.training.test_checkpoints.AtStep", "init_args": {"step": step, "what": what}}


def test_a_run_shorter_than_the_averaging_saves_what_it_trained(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, start_step=50, max_steps=6))
    last = read(tmp_path)
    live = {name: value for name, value in last["current_model_state"].items() if name.startswith("transformer.")}
    arguments = config(tmp_path)["model"]["init_args"]
    initial = MaskedDiffusionModule(arguments["tokenizers"], arguments["transformer"])
    initial.configure_model()
    name = "transformer.layers.0.mlp.down.weight"
    assert not torch.equal(live[name], initial.state_dict()[name])
    assert same(live, last["state_dict"])
    assert torch.equal(weights(tmp_path)["layers.0.mlp.down.weight"], live[name])


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


@pytest.mark.parametrize("start_step", [0])
def test_a_finished_run_that_is_continued_is_the_longer_run(data, tmp_path, start_step):
    fit(tmp_path / "whole", settings(tmp_path / "whole", data, start_step, max_steps=12))
    fit(tmp_path / "part", settings(tmp_path / "part", data, start_step, max_steps=7))
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "rest", settings(tmp_path / "rest", data, start_step, max_steps=12), "--ckpt_path", last)
    whole, rest = scalars(tmp_path / "whole")["loss"], scalars(tmp_path / "rest")["loss"]
    assert rest == {step: whole[step] for step in range(7, 12)}
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "rest"))


STOPS = {
    "stop": (7, {}),
    "stop in accumulation": (4, {"accumulate_grad_batches": 2}),
    "Ctrl-C": (7, {}),
    "Ctrl-C before a step": (8, {}),
    "Ctrl-C in validation": (7, {"val_check_interval": 7, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}),
    "error": (7, {}),
    "max_epochs": (10, {}),
}


@pytest.mark.parametrize("what", STOPS)
def test_a_stopped_run_goes_on_exactly(data, tmp_path, what):
    """The weights, the averaged ones, the losses and the validations are those of a run that was not stopped."""
    step, trainer = STOPS[what]
    whole, run = tmp_path / "whole", tmp_path / "run"
    fit(whole, settings(whole, data, 3, **trainer, max_steps=12))
    ended = {"max_steps": -1, "max_epochs": 2} if what == "max_epochs" else {"max_steps": 12}
    extra = [at_step(7 if "before" in what else step, what.removesuffix(" in accumulation"))]
    made = settings(run, data, 3, extra=extra, **trainer, **ended)
    if "Ctrl-C" in what:
        with pytest.raises(SystemExit, match="1"):
            fit(run, made)
    elif what == "error":
        with pytest.raises(RuntimeError, match="an error in a step"):
            fit(run, made)
    else:
        fit(run, made)
    assert read(run)["global_step"] == step
    assert (run / "model").exists() == (what in ("stop", "stop in accumulation", "max_epochs"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    fit(run, settings(run, data, 3, **trainer, max_steps=12), "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert same(weights(whole), weights(run))
    assert same(read(whole)["current_model_state"], read(run)["current_model_state"])
    expected, got = scalars(whole), scalars(run)
    assert got["loss"] == expected["loss"]
    validated = {at: value for at, value in got["validation/joint"].items() if at != step - 1 or "stop" not in what}
    assert validated == expected["validation/joint"]  # but for the one that ends a run


def test_the_best_of_the_last_validation_is_kept(data, tmp_path):
    made = settings(tmp_path, data, max_epochs=3, max_steps=-1)
    made["trainer"]["callbacks"][-1]["init_args"] = {
        "dirpath": str(tmp_path / "checkpoints"),
        "monitor": "validation/joint",
        "filename": "best",
        "every_n_epochs": 1,
    }
    fit(tmp_path, made)
    best = min(scalars(tmp_path)["validation/joint"].items(), key=lambda entry: entry[1])[0]
    assert read(tmp_path, "best")["global_step"] == best + 1
    assert read(tmp_path)["global_step"] == 15


def test_a_dry_run_touches_nothing(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors")}
    fit(tmp_path, settings(tmp_path, data, max_steps=9), "--trainer.fast_dev_run", "true")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors")}
    assert before == after


def test_an_overwritten_run_is_kept_until_the_new_one_starts(data, tmp_path):
    fit(tmp_path, settings(tmp_path, data, max_steps=2))
    with pytest.raises(SystemExit, match=r"metadata\.jsonl (is missing|does not exist)"):
        fit(tmp_path, settings(tmp_path, tmp_path / "nowhere"), "--overwrite", "true")
    assert read(tmp_path)["global_step"] == 2


def test_averaging_starts_in_time_with_accumulation(data, tmp_path):
    made = settings(tmp_path, data, start_step=3, max_steps=4, accumulate_grad_batches=2)
    fit(tmp_path, made)
    last, name = read(tmp_path), "transformer.embed.weight"
    assert not torch.equal(last["state_dict"][name], last["current_model_state"][name])


def test_the_logged_loss_is_that_of_its_batch(data, tmp_path):
    """With accumulation too: near log 257 a token for an untrained model, however long the documents are."""
    made = settings(tmp_path, data, max_steps=2, accumulate_grad_batches=4)
    made["model"]["init_args"]["objective"] = {"weighting": "uniform", "normalisation": "masked"}
    fit(tmp_path, made)
    assert all(4 < loss < 7 for loss in scalars(tmp_path)["loss"].values())


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
    (saved,) = tmp_path.glob("log/config.yaml")
    assert "overwrite" not in yaml.safe_load(saved.read_text())
    main(["validate", "--config", str(saved), "--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")])


def test_two_runs_at_once_are_refused(tmp_path):
    first, second = Checkpoints(str(tmp_path)), Checkpoints(str(tmp_path))
    first.claim(continues=False)
    with pytest.raises(ValueError, match="another training is writing to"):
        second.claim(continues=True)
    first._release()
    second.claim(continues=True)
    second._release()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
def test_lightnings_own_average_is_refused(data, tmp_path):
    made = settings(tmp_path, data)
    made["trainer"]["callbacks"][0]["class_path"] = "lightning.pytorch.callbacks.EMAWeightAveraging"
    made["trainer"]["callbacks"][0]["init_args"] = {"decay": 0.9}
    with pytest.raises(SystemExit, match=r"Use multidiff\.training\.AveragedWeights"):
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
    with pytest.raises(ValueError, match=r"alone.ckpt: tokenizer 'text' .*'../../x' is outside of its folder"):
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


def test_checkpoints_are_whole_wherever_temporary_files_lie(tmp_path, monkeypatch):
    """Killed at any moment, also with TMPDIR on another file system, the file is the old one or the new one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        monkeypatch.setenv("TMPDIR", elsewhere)
        monkeypatch.setattr(tempfile, "tempdir", None)
        path, content = tmp_path / "last.ckpt", {"weight": torch.zeros(2**20)}
        WholeFiles().save_checkpoint(content, path)
        start = time.monotonic()
        WholeFiles().save_checkpoint(content, path)
        seconds, random = time.monotonic() - start, Random(0)
        for _ in range(20):
            child = multiprocessing.get_context("fork").Process(target=_save_again_and_again, args=(content, path))
            child.start()
            time.sleep(random.uniform(0.5, 3) * seconds)
            child.kill()
            child.join()
            assert torch.load(path, weights_only=True)["weight"].shape == (2**20,)
        assert os.listdir(elsewhere) == []
    WholeFiles().save_checkpoint({}, path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def _save_again_and_again(content, path):
    while True:
        WholeFiles().save_checkpoint(content, path)


def test_a_full_disk_is_a_sentence(tmp_path):
    """A limit on the size of a file stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"a\.ckpt cannot be written"):
            WholeFiles().save_checkpoint({"weight": torch.zeros(2**20)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be written"):
        WholeFiles().save_checkpoint({}, tmp_path / "file" / "a.ckpt")


def test_a_process_that_fails_ends_those_that_it_started(tmp_path):
    """They may wait for it in a collective operation, for as long as its time limit."""
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [waiting]
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    Checkpoints(str(tmp_path)).on_exception(trainer, None, RuntimeError("an error"))
    assert waiting.wait(timeout=20) == -signal.SIGKILL
