"""Training by the CLI: runs, resumes bit for bit, evaluates, saves; what a step waits for and is refused."""

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from multidiff import AncestralSampler, Blank, Given, MultiDiffPipeline
from multidiff.cli import main
from multidiff.data import DocumentDataModule
from multidiff.models import MaskedDiffusionTransformer
from multidiff.objectives import Noising, Objective
from multidiff.processes import Cosine, Hybrid, Uniform
from multidiff.training import MaskedDiffusionModule
from tests.helpers.far import FAR, FarDevice, send
from tests.helpers.pipelines import items
from tests.helpers.ranks import QUIET
from tests.helpers.runs import config, scalars, write_config, write_folder

TOKENIZERS = {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight steps in one go; an epoch has five batches, so a checkpoint after seven lies within the second."""
    folder = tmp_path_factory.mktemp("trained")
    write_folder(folder / "data")
    path = write_config(folder, config(folder))
    main(["fit", "--config", path])
    return folder, path


def test_training_saves_logs_and_previews(trained):
    folder, _ = trained
    values = scalars(folder)
    assert list(values["loss"]) == list(range(8))
    assert {
        "train/text",
        "train/shout",
        "validation/text/conditional",
        "validation/text/unconditional",
        "validation/joint",
        "standard_error/validation/joint",
    } <= set(values)
    errors = values["standard_error/validation/joint"]
    assert errors.keys() == values["validation/joint"].keys()
    assert all(0 < error < values["validation/joint"][step] for step, error in errors.items())
    # The words of every document have as many bytes as codes, and two ends: bits per byte are more than nats per token.
    bits = values["bits_per_byte/validation/joint"]
    assert bits.keys() == errors.keys() == values["standard_error/bits_per_byte/validation/joint"].keys()
    assert all(value / values["validation/joint"][step] > 1 / math.log(2) for step, value in bits.items())
    assert set(values["likelihood_draws/validation"].values()) == {1.0}
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    assert any("text/0/made" in tag for tag in events.Tags()["tensors"])
    record = json.loads((folder / "model" / "training.json").read_text())
    assert record["steps"] == 8
    assert record["samples_seen"] == 32


def test_saved_model_and_checkpoint_are_the_averaged_weights(trained):
    folder, _ = trained
    pipelines = [
        MultiDiffPipeline.from_pretrained(path) for path in (folder / "model", folder / "checkpoints" / "8.ckpt")
    ]
    live = torch.load(folder / "checkpoints" / "8.ckpt", weights_only=True)["current_model_state"]
    documents = [[Given("text", "one"), Blank("shout", tokens=4)]]
    answers = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.samplers["text"].config["canvas"] == {"tokens": 5}
        assert not torch.equal(pipeline.transformer.embed.weight, live["transformer.embed.weight"])
        answers.append(pipeline(documents, generator=torch.Generator().manual_seed(0)).documents[0][1].item)
    assert torch.equal(*(pipeline.transformer.embed.weight for pipeline in pipelines))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("workers", "interrupted_at"), [(0, 3), (0, 5), (0, 7), (2, 7)])
def test_a_resumed_run_is_the_same_run(trained, tmp_path, workers, interrupted_at):
    folder, _ = trained
    settings = config(tmp_path)
    settings["data"]["init_args"]["source"] = str(folder / "data")
    settings["data"]["init_args"]["num_workers"] = workers
    path = write_config(tmp_path, settings)
    checkpoint = folder / "checkpoints" / f"{interrupted_at}.ckpt"
    if workers:
        main(["fit", "--config", path])  # loaders save their state only for the number of workers they have
        checkpoint = tmp_path / "checkpoints" / f"{interrupted_at}.ckpt"
    main(["fit", "--config", path, "--ckpt_path", str(checkpoint)])
    expected, got = scalars(folder)["loss"], scalars(tmp_path)["loss"]
    for step in range(interrupted_at, 8):
        assert got[step] == expected[step]
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["samples_seen"] == 32
    one, two = (
        MultiDiffPipeline.from_pretrained(place / "model").transformer.state_dict() for place in (folder, tmp_path)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_command_line_wins_over_a_checkpoint(trained, tmp_path):
    folder, path = trained
    checkpoint = str(folder / "checkpoints" / "8.ckpt")
    with pytest.raises(SystemExit, match="transformer has hidden_size 32, the configuration 64"):
        main(
            ["validate", "--config", path, "--ckpt_path", checkpoint, "--model.init_args.transformer.hidden_size", "64"]
        )
    # No tensor tells: only the settings do.
    theta = "--model.init_args.transformer.rope_theta"
    with pytest.raises(SystemExit, match=r"rope_theta 10000.0, the configuration 500: set"):
        main(["validate", "--config", path, "--ckpt_path", checkpoint, theta, "500"])


def test_a_checkpoint_keeps_the_defaults_of_its_time(trained):
    folder, _ = trained
    saved = torch.load(folder / "checkpoints" / "8.ckpt", weights_only=True)["multidiff"]["transformer"]
    defaults = inspect.signature(MaskedDiffusionTransformer.__init__).parameters
    assert saved.keys() == defaults.keys() - {"self", "vocabulary_rows"}


def test_a_checkpoint_of_another_kind_is_refused(trained, tmp_path):
    folder, path = trained
    checkpoint = torch.load(folder / "checkpoints" / "8.ckpt", weights_only=True)
    del checkpoint["multidiff"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="another kind of model"):
        main(["validate", "--config", path, "--ckpt_path", str(tmp_path / "other.ckpt")])


def test_validate_and_test_report_nats_per_token(trained, capsys):
    folder, path = trained
    for command in ("validate", "test"):
        main([command, "--config", path, "--ckpt_path", str(folder / "checkpoints" / "8.ckpt")])
        printed = capsys.readouterr().out
        stage = "validation" if command == "validate" else "test"
        for label in ("text/conditional", "text/unconditional", "shout/conditional", "shout/unconditional", "joint"):
            assert f"{stage}/{label}" in printed
            assert re.search(rf"^\| {label} \| \d\.\d{{4}} ± 0\.\d{{4}} \| [\d.]+ ± [\d.]+ \| byte \|$", printed, re.M)


def test_uniform_and_mixed_noise_train_sample_and_come_back(tmp_path, capsys):
    """From YAML to generation, by the folder and by the checkpoint."""
    write_folder(tmp_path / "data")
    made = config(tmp_path, max_steps=3, val_check_interval=3)
    arguments = made["model"]["init_args"]
    arguments["transformer"] |= {"time_input": True}
    arguments["objective"] = {
        "process": {"class_path": "multidiff.processes.Hybrid", "init_args": {"uniform_share": 0.2}},
        "processes": {
            "shout": {
                "class_path": "multidiff.processes.Uniform",
                "init_args": {"schedule": {"class_path": "multidiff.processes.Cosine"}},
            }
        },
        "weighting": {"text": "clipped"},
    }
    arguments["samplers"] = {"shout": {"num_inference_steps": 5}, "text": {"sampler": "ancestral"}}
    main(["fit", "--config", write_config(tmp_path, made)])
    assert {"validation/joint", "standard_error/validation/joint"} <= scalars(tmp_path).keys()
    pipes = [
        MultiDiffPipeline.from_pretrained(path) for path in (tmp_path / "model", tmp_path / "checkpoints" / "last.ckpt")
    ]
    processes = {"text": Hybrid(uniform_share=0.2), "shout": Uniform(Cosine())}
    assert [pipe.processes for pipe in pipes] == [processes] * 2
    outputs = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert isinstance(pipe.samplers["text"], AncestralSampler)
        assert pipe.samplers["shout"].settings["num_inference_steps"] == 5
        documents = [[Given("text", "abcd"), Blank("shout")], [Blank("text"), Given("shout", "ABCD")]]
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        outputs.append(pipe(documents, generator=generators))
    assert items(outputs[0].documents) == items(outputs[1].documents)
    capsys.readouterr()
    generate = ["generate", "--model", str(tmp_path / "model"), "--given", "text=abcd", "--fill", "shout"]
    main([*generate, "--output", str(tmp_path / "made"), "--sampler.shout.temperature", "0.5"])
    with pytest.raises(SystemExit, match="sampler of 'shout' decides masked codes, but its process Uniform masks none"):
        main([*generate, "--output", str(tmp_path / "other"), "--sampler.shout.sampler", "mask"])
    arguments["samplers"]["shout"] = {"sampler": "mask"}
    with pytest.raises(SystemExit, match=r"model\.samplers, shout: The sampler of 'shout' decides masked codes"):
        main(["fit", "--config", write_config(tmp_path, made), "--overwrite", "true"])


def test_an_untrained_model_is_near_uniform(tmp_path):
    write_folder(tmp_path / "data")
    path = write_config(tmp_path, config(tmp_path))
    main(["test", "--config", path])
    values = {tag: next(iter(steps.values())) for tag, steps in scalars(tmp_path).items() if tag.startswith("test/")}
    # A canvas has more tokens (its max_eos_padding) than codes + 1, which adds to the nats per token.
    for label in ("test/text/conditional", "test/shout/unconditional", "test/joint"):
        assert math.log(257) - 0.3 < values[label] < 2.2 * math.log(257)


def test_a_data_module_of_other_tokenizers_is_refused(trained, tmp_path):
    _, path = trained
    settings = json.loads(Path(path).read_text())
    settings["data"]["init_args"]["tokenizers"] = {"shout": {"plugin": "bpe"}, "text": {"plugin": "bpe"}}
    with pytest.raises(SystemExit, match=r"multidiff: the data module .* in this order"):
        main(["validate", "--config", write_config(tmp_path, settings)])


def test_a_label_that_no_document_has_is_refused(tmp_path):
    data = DocumentDataModule(str(write_folder(tmp_path)), TOKENIZERS)
    tasks = [{"roles": {"text": "target", "caption": "given"}}]
    module = MaskedDiffusionModule(TOKENIZERS, SMALL, tasks=tasks)
    sentence = (
        r"A task names the label 'caption', but no training document has a segment with it\. There are (text, shout|"
        r"shout, text)\."
    )
    with pytest.raises(ValueError, match=sentence):
        Trainer(**QUIET, max_steps=1).fit(module, datamodule=data)


def labelled(folder):
    """Questions, and answers with and without a label."""
    rows = [
        {"split": split, "segments": [{"text": f"why {index}?", "label": "question"}, {"text": "so"}, {"shout": "A"}]}
        for split in ("train", "validation")
        for index in range(4)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DocumentDataModule(str(folder), TOKENIZERS, batch_size=2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true", "bf16-mixed"])
def test_every_precision_trains_and_measures_by_label(tmp_path, precision):
    """The weights of the loss and its divisor are not rounded to the precision of the model."""
    tasks = [{"roles": {"text": "target", "shout": "removed"}}]  # the data alone name the label `question`
    seen = []

    class Looks(MaskedDiffusionModule):
        def training_step(self, batch, batch_index):
            seen.append(batch)
            return super().training_step(batch, batch_index)

    module = Looks(TOKENIZERS, SMALL, tasks=tasks)
    trainer = Trainer(**QUIET, max_steps=2, precision=precision, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=labelled(tmp_path))
    assert {tensor.dtype for batch in seen for tensor in (batch.loss_weights_M, batch.loss_divisor)} == {torch.float32}
    trainer.validate(module, datamodule=labelled(tmp_path), verbose=False)
    kinds = ("conditional", "unconditional")
    names = {f"validation/{label}/{kind}" for label in ("text", "shout", "question") for kind in kinds}
    assert set(trainer.callback_metrics) >= names | {"validation/joint"}
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


def noised_batch(module, data):
    documents = data.documents("train")
    noising = Noising(data.sequencer, module.tasks, module.objective, seed=0)
    keys = next(iter(data.train_dataloader().batch_sampler))[:4]
    return noising(documents.__getitems__(keys))


def stub_trainer(accumulate=1, step=1):
    return SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
        accumulate_grad_batches=accumulate,
        log_every_n_steps=2,
        global_step=step,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_never_waits_for_the_device(tmp_path, accumulate):
    """Neither when the batch is sent, nor in the step, nor where the gradient is scaled."""
    data = labelled(tmp_path)
    module = MaskedDiffusionModule(TOKENIZERS, SMALL, objective=Objective(loss_weights={"text": 2.0}))
    module.configure_model()
    batch = noised_batch(module, data)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module.trainer = stub_trainer(accumulate)
    near = float(module.training_step(batch, 0).detach())
    module._divisors.clear()
    assert logged.keys() == {"loss", "train/text", "train/shout"}
    with FarDevice() as device:
        send(module)
        for weight in module.parameters():
            weight.requires_grad_()
        far_batch = batch.to(FAR)
        loss = module.training_step(far_batch, 0)
        assert device.waits == []
        loss.backward()
        assert all(weight.grad is not None for weight in module.parameters())
        module.on_after_backward()
        assert device.waits == []
        assert float(loss.detach()) == pytest.approx(near, rel=1e-6)
    assert len(device.waits) == 1  # the line above: waits are counted
    assert logged["loss"].device == FAR


def test_label_smoothing_trains_and_is_not_logged(tmp_path):
    """ε of the target is spread over all ids: (1 - ε) times the cross-entropy, and ε times the mean of -log p."""
    data, logged, smoothing = labelled(tmp_path), [], 0.2
    for objective in (Objective(), Objective(label_smoothing=smoothing)):
        module = MaskedDiffusionModule(TOKENIZERS, SMALL, objective=objective)
        module.configure_model()
        batch = noised_batch(module, data)
        logged.append({})
        module.log = lambda name, value, **_: logged[-1].update({name: float(value)})
        module.trainer = stub_trainer()
        module.training_step(batch, 0)
    positions = batch.logit_positions(module.vocabulary)
    with torch.no_grad():
        logits = module.transformer(batch.ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3)
    log_probs = [torch.log_softmax(logits_NV.double(), 1) for logits_NV in logits]
    targets = batch.targets_M.split(list(batch.sizes))
    nats_M = torch.cat([-log.gather(1, target[:, None])[:, 0] for log, target in zip(log_probs, targets, strict=True)])
    mean_M = torch.cat([-log.mean(1) for log in log_probs])
    for logs, trained_M in zip(logged, (nats_M, (1 - smoothing) * nats_M + smoothing * mean_M), strict=True):
        expected = float((trained_M * batch.loss_weights_M).sum() / batch.loss_divisor)
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert logged[0]["train/text"] == pytest.approx(logged[1]["train/text"], rel=1e-6)


def test_the_bounds_are_logged_as_often_as_the_trainer_logs(tmp_path):
    data = labelled(tmp_path)
    module = MaskedDiffusionModule(TOKENIZERS, SMALL)
    module.configure_model()
    batch = noised_batch(module, data)
    for step, names in ((0, {"loss"}), (1, {"loss", "train/text", "train/shout"})):
        logged = {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: value})
        module.trainer = stub_trainer(step=step)
        module.training_step(batch, 0)
        assert logged.keys() == names


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_settings_of_the_layers(tmp_path):
    module = MaskedDiffusionModule(TOKENIZERS, SMALL, gradient_checkpointing=True, compile_layers=True)
    with pytest.raises(ValueError, match="compile_layers needs a GPU"):
        Trainer(**QUIET, max_steps=1).fit(module, datamodule=labelled(tmp_path))
    other = MaskedDiffusionModule(TOKENIZERS, SMALL, gradient_checkpointing=True, compile_layers=True)
    assert other.transformer.embed.weight.is_meta
    other.configure_model()  # without a trainer
    assert other.transformer.gradient_checkpointing
    assert all(layer._compiled_call_impl is not None for layer in other.transformer.layers)
    weight = other.transformer.embed.weight
    other.configure_model()  # Lightning calls it in each of fit, validate and test
    assert other.transformer.embed.weight is weight
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
