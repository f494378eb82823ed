"""Training by the CLI: runs, resumes bit for bit, evaluates, saves; data folders good and bad."""

import inspect
import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from multidiff import Blank, Given, MultiDiffPipeline
from multidiff.cli import main
from multidiff.data import DocumentDataModule
from multidiff.data.module import ShuffledBatches
from multidiff.models.transformer import MaskedDiffusionTransformer
from multidiff_bpe import BPETokenizer
from tests.helpers.runs import WORDS, config, scalars, write_config, write_folder


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
    } <= set(values)
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
    settings["data"]["init_args"]["folder"] = str(folder / "data")
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


def test_an_untrained_model_is_near_uniform(tmp_path):
    write_folder(tmp_path / "data")
    path = write_config(tmp_path, config(tmp_path))
    main(["test", "--config", path])
    values = {tag: next(iter(steps.values())) for tag, steps in scalars(tmp_path).items() if tag.startswith("test/")}
    # A canvas has more tokens (its max_eos_padding) than codes + 1, which adds to the nats per token.
    for label in ("test/text/conditional", "test/shout/unconditional", "test/joint"):
        assert math.log(257) - 0.3 < values[label] < 2.2 * math.log(257)


def test_shuffled_batches_cover_split_and_resume():
    ranks = [ShuffledBatches(23, 3, seed=5, rank=rank, ranks=2) for rank in range(2)]
    first = [[key for batch in rank for key in batch] for rank in ranks]
    assert all(len(keys) == 9 for keys in first)
    assert len({key for keys in first for key in keys}) == 18
    assert {epoch for keys in first for epoch, _ in keys} == {0}
    second = [[key for batch in rank for key in batch] for rank in ranks]
    assert {epoch for keys in second for epoch, _ in keys} == {1}
    assert [i for _, i in first[0]] != [i for _, i in second[0]]
    one = ShuffledBatches(23, 3, seed=5)
    iterator = iter(one)
    head = [next(iterator) for _ in range(4)]
    other = ShuffledBatches(23, 3, seed=5)
    other.load_state_dict(one.state_dict())
    assert head + list(other) == list(ShuffledBatches(23, 3, seed=5))
    assert next(iter(other))[0][0] == 1
    assert len(list(ShuffledBatches(2, 64, seed=0))) == 1


BAD_LINES = {
    "line 41: not JSON": "{oops",
    "line 41: expected": "[1, 2]",
    "line 41: split 'dev' is none of": '{"split": "dev", "segments": [{"text": "a"}]}',
    "line 41: no tokenizer is called 'smell'; the configuration has text, shout": '{"segments": [{"smell": "a"}]}',
    "line 41, segment 0: expected one tokenizer name": '{"segments": [{"text": "a", "shout": "b"}]}',
    "line 41: unknown key 'spilt'": '{"spilt": "train", "segments": [{"text": "a"}]}',
    "line 41: expected .*segments": '{"segments": []}',
}


def data_of(folder, **options):
    return DocumentDataModule(str(folder), {"text": {"plugin": "bpe"}, "shout": {"plugin": "bpe"}}, **options)


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines_are_named(tmp_path, message):
    write_folder(tmp_path, extra=[BAD_LINES[message]])
    with pytest.raises(ValueError, match=f"metadata.jsonl, {message}"):
        data_of(tmp_path).prepare_data()
    assert not list(tmp_path.glob(".tokenized/*"))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.jsonl does not exist"):
        data_of(tmp_path).prepare_data()
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl holds no document"):
        data_of(tmp_path).prepare_data()


def test_bad_items_raise_or_are_skipped_and_counted(tmp_path, caplog):
    lone = '{"segments": [{"text": "\\ud800"}]}'
    write_folder(tmp_path, extra=['{"segments": [{"text": 7}]}', lone, lone])
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 41: .*on_error: skip"):
        data_of(tmp_path).prepare_data()
    with caplog.at_level("INFO"):
        data = data_of(tmp_path, on_error="skip")
        data.prepare_data()
    assert "Left out 3 documents" in caplog.text
    assert "line 42" in caplog.text
    assert "line 43" in caplog.text
    assert len(data.documents("train")) == 20


def test_a_bad_item_costs_others_few_more_calls(tmp_path, monkeypatch):
    calls = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: calls.append(len(items)) or encode(self, items))
    rows = [json.dumps({"segments": [{"text": str(number) if number != 50 else 7}]}) for number in range(100)]
    write_folder(tmp_path, number=0, extra=rows)
    data = data_of(tmp_path, on_error="skip")
    assert len(data.documents("train")) == 99
    assert sum(calls) == 99  # what cannot be read is not asked for
    calls.clear()
    rows[50] = json.dumps({"segments": [{"text": "\ud800"}]})
    write_folder(tmp_path, number=0, extra=rows)
    assert len(data_of(tmp_path, on_error="skip").documents("train")) == 99
    assert len(calls) < 20


def test_workers_hand_over_a_batch_of_sounds_with_few_open_files(tmp_path):
    for number in range(300):
        soundfile.write(tmp_path / f"{number}.wav", np.full(40, 0.1), 8_000)
    rows = [json.dumps({"segments": [{"speech": f"{number}.wav"}]}) for number in range(300)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = DocumentDataModule(
        str(tmp_path), {"speech": {"plugin": "encodec"}}, batch_size=4, row_length=40, num_workers=2
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 150, hard))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no open files were left, and no batch came"))
    signal.alarm(60)
    try:
        data.prepare_data()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(data.documents("train")) == 300


def test_files_of_like_size_are_tokenized_together_and_not_too_many(tmp_path, monkeypatch):
    batches = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: batches.append(list(items)) or encode(self, items))
    monkeypatch.setattr("multidiff.data.tokenized._BYTES_PER_BATCH", 100)
    monkeypatch.setattr("multidiff.data.tokenized._ITEMS_PER_BATCH", 4)
    for name, size in {"a": 70, "b": 300, "c": 40, "d": 30, "e": 90, "f": 10}.items():
        (tmp_path / name).write_bytes(bytes(size))
    rows = [json.dumps({"segments": [{"text": text}]}) for text in "abcdefxyz"]
    write_folder(tmp_path, number=0, extra=rows)
    data_of(tmp_path).prepare_data()
    assert batches == [["b"], ["e"], ["a"], list("cdfx"), list("yz")]


def test_each_item_is_tokenized_once_and_again_after_a_change(tmp_path, monkeypatch):
    encoded = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, items: encoded.extend(items) or encode(self, items))
    write_folder(tmp_path)
    (tmp_path / "one").write_text("a file that a text happens to name")
    data_of(tmp_path).prepare_data()
    assert sorted(encoded) == sorted(WORDS + [word.upper() for word in WORDS])  # of 40 documents
    data_of(tmp_path).prepare_data()
    assert len(encoded) == 16
    write_folder(tmp_path, number=36)
    data_of(tmp_path).prepare_data()
    assert len(encoded) == 32
    (tmp_path / "one").write_text("another content")
    data_of(tmp_path).prepare_data()
    assert len(encoded) == 48
    assert len(list((tmp_path / ".tokenized").iterdir())) == 3


def test_captions_of_any_length_and_script(tmp_path):
    """Texts longer than a file's name may be, in characters or only in bytes, and empty ones."""
    texts = ["七" * 102, "a" * 5000, "nul \0 inside", ""]
    rows = [json.dumps({"segments": [{"text": text}, {"shout": "A"}]}, ensure_ascii=False) for text in texts]
    write_folder(tmp_path, number=0, extra=rows)
    data = data_of(tmp_path)
    documents = data.documents("train")
    kept = [data.tokenizers["text"].decode([documents.codes(index)[0][1]])[0] for index in range(len(documents))]
    assert kept == texts
    (place,) = (tmp_path / ".tokenized").iterdir()
    data_of(tmp_path).prepare_data()
    assert list((tmp_path / ".tokenized").iterdir()) == [place]


def test_documents_hold_what_was_written(tmp_path):
    data = data_of(write_folder(tmp_path), max_eos_padding={"text": 2})
    documents = data.documents("validation")
    for index in range(len(documents)):
        segments = documents[0, index]
        items = [data.tokenizers[s.tokenizer].decode([data.sequencer.codes(s)])[0] for s in segments]
        assert sorted(items, key=str.isupper) == [WORDS[(4 * index + 2) % 8], WORDS[(4 * index + 2) % 8].upper()]
        again = documents[0, index]
        assert all(torch.equal(a.ids_N, b.ids_N) for a, b in zip(segments, again, strict=True))
    sizes = {len(segment) for epoch in range(20) for segment in documents[epoch, 0] if segment.tokenizer == "text"}
    assert sizes == {4, 5}


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_eos_padding nose"):
        data_of(tmp_path, max_eos_padding={"nose": 1})
    with pytest.raises(ValueError, match="max_eos_padding image: its length never varies"):
        DocumentDataModule(str(tmp_path), {"image": {"plugin": "vq"}}, max_eos_padding={"image": 3})
    with pytest.raises(ValueError, match="batch_size 0"):
        data_of(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="Did you mean 'bpe'"):
        DocumentDataModule(str(tmp_path), {"text": {"plugin": "bp"}})
    with pytest.raises(ValueError, match="has no plugin"):
        DocumentDataModule(str(tmp_path), {"text": {}})


def test_a_data_module_of_other_tokenizers_is_refused(trained, tmp_path):
    _, path = trained
    settings = json.loads(Path(path).read_text())
    settings["data"]["init_args"]["tokenizers"] = {"shout": {"plugin": "bpe"}, "text": {"plugin": "bpe"}}
    with pytest.raises(SystemExit, match=r"multidiff: the data module .* in this order"):
        main(["validate", "--config", write_config(tmp_path, settings)])
