"""What a training logs of its speed, what it waits for, and the peak of devices."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from multidiff.data import DocumentDataModule
from multidiff.models import forward_flops
from multidiff.objectives import Noising, Objective, Task
from multidiff.training import MaskedDiffusionModule, Throughput, peak, throughput
from multidiff.training.peak import listed_flops, measured_flops
from tests.helpers.far import FAR, FarDevice
from tests.helpers.ranks import QUIET, TOKENIZERS, examples_of
from tests.helpers.runs import write_folder

SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
NAMES = ("tokens/s", "documents/s", "TFLOP/s", "MFU")


class Kept(DummyLogger):
    """`rows`: what was logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


class Spied(MaskedDiffusionModule):
    """`batches`: what it trained on."""

    def training_step(self, batch, batch_index):
        self.__dict__.setdefault("batches", []).append(batch)
        return super().training_step(batch, batch_index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("throughput") / "data")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_what_was_done_since_it_logged_last(folder, monkeypatch, accumulate):
    """On a clock that goes on by a second whenever it is read, with a validation after every optimizer step's."""
    clock = itertools.count()
    monkeypatch.setattr(throughput, "_now", lambda trainer: float(next(clock)))
    module = Spied(TOKENIZERS, SMALL)
    logger, steps = Kept(), 4
    trainer = Trainer(
        **{**QUIET, "logger": logger},
        max_steps=steps,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        callbacks=[Throughput(peak_tflops=2e-6)],
    )
    trainer.fit(module, datamodule=DocumentDataModule(str(folder), TOKENIZERS, batch_size=2))
    assert len(module.batches) == steps * accumulate
    rows = [row for row in logger.rows.values() if "MFU" in row]
    halves = module.batches[: 2 * accumulate], module.batches[2 * accumulate :]
    # The validation between the two takes a second that does not count, and one passes before and after it.
    for row, batches, seconds in zip(rows, halves, (1, 2), strict=True):
        flops = 3 * sum(
            forward_flops(module.transformer, b.document_starts, b.logit_positions(module.vocabulary)) for b in batches
        )
        assert row["documents/s"] == pytest.approx(sum(b.num_documents for b in batches) / seconds)
        assert row["tokens/s"] == pytest.approx(sum(len(b.ids_P) for b in batches) / seconds)
        assert row["TFLOP/s"] == pytest.approx(flops / seconds / 1e12)
        assert row["MFU"] == pytest.approx(flops / seconds / 2e6)
    assert set(NAMES) <= trainer.progress_bar_metrics.keys()


def test_is_there_unless_listed(monkeypatch, folder):
    """Without settings, the share is of a product that is measured here."""
    monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: {torch.float32: 3e9}[dtype])
    peak._peak_flops.cache_clear()
    for callbacks in ([], [Throughput(peak_tflops=1e-3)]):
        logger = Kept()
        trainer = Trainer(
            **{**QUIET, "logger": logger}, max_steps=1, log_every_n_steps=1, limit_val_batches=0, callbacks=callbacks
        )
        module = MaskedDiffusionModule(TOKENIZERS, SMALL)
        trainer.fit(module, datamodule=DocumentDataModule(str(folder), TOKENIZERS, batch_size=2))
        assert sum(isinstance(callback, Throughput) for callback in trainer.callbacks) == 1
        (row,) = logger.rows.values()
        assert row["TFLOP/s"] / row["MFU"] == pytest.approx(1e-3 if callbacks else 3e-3)
    peak._peak_flops.cache_clear()


def test_waits_for_the_device_only_where_it_logs(folder, monkeypatch):
    """And sums over the ranks there."""
    examples, sequencer = examples_of(folder)
    module = MaskedDiffusionModule(TOKENIZERS, SMALL)
    module.log = lambda name, value, **_: logged.update({name: value})
    batch = Noising(sequencer, [Task({"others": "target"})], Objective(), seed=1)(examples)
    waited, logged = [], {}
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=FAR, reduce=lambda sums, reduce_op: {"sum": sums * 3}[reduce_op]),
        world_size=1,
        log_every_n_steps=3,
        global_step=0,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
    )
    callback = Throughput(peak_tflops=1e-6)
    callback.on_train_start(trainer, module)
    assert waited == [FAR]
    with FarDevice() as device:
        far = batch.to(FAR)
        for trainer.global_step in (1, 2, 3):
            callback.on_train_batch_end(trainer, module, None, far, trainer.global_step - 1)
            assert len(waited) == 1 + (trainer.global_step == 3)
    assert device.waits == []
    assert set(logged) == set(NAMES)
    alone = dict(logged)

    clock = itertools.count()
    monkeypatch.setattr(throughput, "_now", lambda trainer: float(next(clock)))
    trainer.world_size, trainer.strategy.root_device = 2, torch.device("cpu")
    callback.on_train_start(trainer, module)
    for trainer.global_step in (1, 2, 3):
        callback.on_train_batch_end(trainer, module, None, batch, trainer.global_step - 1)
    assert logged["documents/s"] == 3 * 3 * len(examples)
    assert logged["tokens/s"] == 3 * 3 * len(batch.ids_P)
    assert logged["MFU"] == pytest.approx(logged["TFLOP/s"] / 3e-6)  # three times as many devices
    assert alone["MFU"] == pytest.approx(alone["TFLOP/s"] / 1e-6)


def test_a_peak_must_be_positive():
    with pytest.raises(ValueError, match="peak_tflops must be more than 0"):
        Throughput(peak_tflops=0)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of one
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71),
        ("Tesla V100-SXM2-16GB", None),  # bf16 is emulated there
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_table_takes_whole_names(name, bf16):
    assert listed_flops(name, torch.bfloat16, True) == (None if bf16 is None else pytest.approx(1e12 * bf16))


def test_the_table_knows_precisions():
    name = "NVIDIA A100-SXM4-40GB"
    assert listed_flops(name, torch.float32, True) == 156e12
    assert listed_flops(name, torch.float32, False) == 19.5e12
    assert listed_flops(name, torch.float16, True) == 312e12
    assert listed_flops(name, torch.float64, True) is None
    assert listed_flops("Tesla T4", torch.float32, True) == 8.1e12  # it has no TF32
    assert listed_flops("Tesla V100-SXM2-16GB", torch.float16, True) == 125e12


def test_a_known_gpu_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: 1.0)
    gpu = torch.device("cuda", 0)
    found = []
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        found.append([peak.peak_flops(gpu, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)])
    peak._peak_flops.cache_clear()
    assert found == [[19.5e12, 312e12, 1.0], [156e12, 312e12, 1.0]]


def test_a_measurement_is_the_best_and_ends(monkeypatch):
    """On a device of 10⁹ operations a second, of which each second product takes twice as long."""
    clock, slow = [0.0], itertools.cycle([2, 1])

    def seconds(factor):
        taken = next(slow) * 2 * len(factor) ** 3 / 1e9
        clock[0] += taken
        return taken

    monkeypatch.setattr(peak, "_seconds", seconds)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: clock[0])
    assert measured_flops(torch.device("cpu"), torch.float32) == pytest.approx(1e9)
    assert clock[0] < 0.5
