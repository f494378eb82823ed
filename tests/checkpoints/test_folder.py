"""Model folders and checkpoints: replaced without a gap, whole or not at all, refused in a sentence where damaged."""

import json
import math
import os
import shutil
import threading
from inspect import signature
from random import Random
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import AmusedScheduler
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from multidiff import Blank, Given, MaskedDiffusionTransformer, MaskSampler, MultiDiffPipeline, SharedVocabulary
from multidiff.checkpoints import check_checkpoint, load_folder, save
from multidiff.checkpoints import transformer as restoring
from multidiff.training.module import MaskedDiffusionModule
from multidiff_bpe import BPETokenizer
from tests.fuzz import checkpoints, models
from tests.helpers.toys import generator


def make(value=None, samplers=None, names=("text", "other")):
    tokenizers = {name: BPETokenizer() for name in names}
    vocabulary = SharedVocabulary.of(tokenizers)
    transformer = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=2, num_heads=2, dropout=0.5)
    transformer.initialize(generator())
    for weight in transformer.parameters() if value is not None else ():
        weight.data.fill_(value)
    pipe = MultiDiffPipeline(transformer.eval(), vocabulary, tokenizers, samplers or {"text": MaskSampler(top_k=5)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_that_is_replaced_is_never_missing_or_mixed(tmp_path):
    """Each has one number in its weights and in its settings."""
    place, loaded, stop = tmp_path / "model", [], threading.Event()
    pipes = [make(value, {"text": MaskSampler(top_k=value)}) for value in (1, 2)]
    pipes[0].save_pretrained(place)

    def read():
        while not stop.is_set():
            parts = load_folder(place)
            weights = parts.transformer.state_dict().values()
            numbers = {float(number) for weight in weights for number in weight.unique()}
            loaded.append(numbers | {float(parts.samplers["text"].config["top_k"])})

    def guarded():
        try:
            read()
        except BaseException as error:
            loaded.append(error)

    reader = threading.Thread(target=guarded)
    reader.start()
    for number in range(20):
        save(pipes[number % 2].parts, place)
    while not loaded:  # whoever replaces faster than another reads makes it read again
        pass
    stop.set()
    reader.join()
    assert all(numbers in ({1.0}, {2.0}) for numbers in loaded), loaded
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed_by_the_next_save(folder):
    (folder.parent / ".model.abc.partial").mkdir()
    make().save_pretrained(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a plugin's own")])
def test_an_error_half_way_leaves_the_earlier_model(folder, monkeypatch, error):
    before = (folder / "model_index.json").read_bytes()

    def fail(tokenizer, place):
        (place / "half").touch()
        raise error

    monkeypatch.setattr(BPETokenizer, "save", fail)
    with pytest.raises((ValueError, RuntimeError), match=r"model cannot be written \(No space|a plugin's own"):
        make().save_pretrained(folder)
    assert (folder / "model_index.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    MultiDiffPipeline.from_pretrained(folder)


def test_a_place_where_no_folder_can_be_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{place} cannot be written"):
            make().save_pretrained(place)
    (tmp_path / "link").symlink_to(folder)
    make(1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert bool((MultiDiffPipeline.from_pretrained(tmp_path / "link").transformer.embed.weight == 1).all())


def test_a_sampler_that_would_come_back_as_another_is_not_saved(tmp_path):
    class Mine(MaskSampler):
        pass

    pipe = make()
    for sampler, kind in ((Mine(), "Mine"), (AmusedScheduler(mask_token_id=9), "AmusedScheduler")):
        pipe.samplers["text"] = sampler
        with pytest.raises(
            ValueError,
            match=rf"sampler of 'text' has the class {kind}, .* Set pipe.samplers\['text'\] = MaskSampler\(\) before",
        ):
            pipe.save_pretrained(tmp_path / "model")
    pipe.samplers["text"] = MaskSampler()
    pipe.save_pretrained(tmp_path / "model")


HUGE = {
    "config.json: num_layers is 1000000000, but the weights have 2 layers": {"num_layers": 10**9},
    "config.json: hidden_size is 1000000000, but the weights have 32": {"hidden_size": 10**9, "num_heads": 1},
    f"config.json: hidden_size is {10**30}, but the weights have 32": {"hidden_size": 10**30},
    "hidden_size is 64, but the weights have 32": {"hidden_size": 64},
    "vocabulary_rows is 1000000000, but the vocabulary has 576 rows": {"vocabulary_rows": 10**9},
    "hidden_size must be a whole number above 0, got '32'": {"hidden_size": "32"},
    "num_layers must be a whole number above 0, got True": {"num_layers": True},
    "rope_theta must be a number from 1 to 1e30, got 0": {"rope_theta": 0},
    "norm_epsilon must be a number from 0 to 1, got None": {"norm_epsilon": None},
    "qk_norm must be true or false, got 1": {"qk_norm": 1},
}


@pytest.mark.parametrize("message", HUGE)
def test_sizes_and_types_are_checked_before_anything_is_allocated(folder, message):
    edit(folder / "transformer" / "config.json", **HUGE[message])
    with pytest.raises(ValueError, match=message):
        MultiDiffPipeline.from_pretrained(folder)


def test_every_setting_of_the_transformer_has_a_kind():
    assert restoring.KINDS.keys() == set(signature(MaskedDiffusionTransformer.__init__).parameters) - {"self"}


def test_a_size_that_no_tensor_bounds_is_refused_before_anything_is_allocated(folder, monkeypatch):
    (path,) = (folder / "transformer").glob("*.safetensors")
    save_file({name: weight for name, weight in load_file(path).items() if name != "embed.weight"}, path)
    edit(folder / "transformer" / "config.json", hidden_size=10**9, num_heads=1)
    monkeypatch.setattr(restoring, "build_transformer", None)
    with pytest.raises(ValueError, match=r"\.safetensors lacks the matrix embed.weight"):
        MultiDiffPipeline.from_pretrained(folder)


@pytest.mark.parametrize("names", [("text", "other"), ("text",)])
def test_the_code_of_the_card_generates(names, tmp_path, capsys):
    make(names=names).save_pretrained(tmp_path / "model")
    code = (tmp_path / "model" / "README.md").read_text().split("```")[1].removeprefix("python")
    assert all(f'("{name}"' in code for name in names)
    exec(code.replace("path/to/this/folder", str(tmp_path / "model")))
    assert ("Given" in code) == ("seven" in capsys.readouterr().out) == (len(names) == 2)


def upload_to(folder, monkeypatch):
    """A hub whose repositories are folders in `folder`."""

    def upload(repo_id, folder_path, **options):
        shutil.copytree(folder_path, folder / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)


EDITED = b"---\nlicense: mit\n---\nMine, in Latin-1: \xe9"


@pytest.mark.parametrize("when", ["after saving", "before loading", "after loading", "downloaded"])
def test_a_card_that_was_edited_in_the_folder_is_pushed(folder, tmp_path, monkeypatch, when):
    upload_to(tmp_path, monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    pipe = make()
    pipe.save_pretrained(folder)
    if when == "after loading":
        pipe = MultiDiffPipeline.from_pretrained(folder)
    (folder / "README.md").write_bytes(EDITED)
    if when in ("before loading", "downloaded"):
        pipe = MultiDiffPipeline.from_pretrained("me/there" if when == "downloaded" else folder)
    assert pipe.push_to_hub("me/it").startswith("https://huggingface.co/me/it/")
    assert (tmp_path / "me/it/README.md").read_bytes() == EDITED
    MultiDiffPipeline.from_pretrained(tmp_path / "me/it")


def test_an_edited_card_survives_every_save_and_a_generated_one_follows_the_model(folder, tmp_path):
    generated = (folder / "README.md").read_text()
    make(names=("text",)).save_pretrained(folder)
    assert (folder / "README.md").read_text() != generated
    (folder / "README.md").write_bytes(EDITED)
    for _ in range(2):
        make().save_pretrained(folder)
        assert (folder / "README.md").read_bytes() == EDITED
    pipe = MultiDiffPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    pipe.save_pretrained(tmp_path / "copy of the copy")
    assert (tmp_path / "copy of the copy" / "README.md").read_bytes() == EDITED
    (folder / "README.md").unlink()
    MultiDiffPipeline.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == generated


SETTINGS = {
    "temperature nan must be a number|NaN is not a JSON number": {"temperature": math.nan},
    "temperature 1e-320 must be 0, which is greedy": {"temperature": 1e-320},
    "guidance_scale 1e[+]308 must be": {"guidance_scale": 1e308},
    "no tokenizer is called 'smell'": {"guidance_scale": {"smell": 2}},
    "num_inference_steps 1000000000 must be": {"num_inference_steps": 10**9},
    "no code is called 900": {"suppress_tokens": [900]},
    "forced_tokens .* must be a table": {"forced_tokens": {"-1": 3}},
    "canvas of text of size .*": {"canvas": {"frames": 3}},
    "has no room": {"canvas": {"tokens": 0}},
    "guidance_schedule .* must be constant": {"guidance_schedule": ["a", "b"]},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_sampler_settings_that_could_not_generate_are_refused_when_they_are_read(folder, message):
    edit(folder / "samplers.json", text=SETTINGS[message])
    with pytest.raises(ValueError, match=rf"samplers\.json.*({message})"):
        MultiDiffPipeline.from_pretrained(folder)


def test_another_models_weights_beside_these_are_refused(folder):
    (path,) = (folder / "transformer").glob("*.safetensors")
    path.with_name("old.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match=r"transformer contains weights of more than one model. Remove .* or old\.safetensors"
    ):
        MultiDiffPipeline.from_pretrained(folder)


def test_whatever_a_plugin_raises_names_its_folder(folder, monkeypatch):
    def fail(place):
        raise KeyError("nowhere")

    monkeypatch.setattr(BPETokenizer, "load", fail)
    with pytest.raises(ValueError, match=r"The tokenizer in .*tokenizers/text cannot be loaded: 'nowhere'"):
        MultiDiffPipeline.from_pretrained(folder)


def test_weights_that_overflow_are_said_to(folder):
    pipe = MultiDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.norm.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=rf"^{folder}: the transformer's logits hold NaN or Inf: check its weights"):
        pipe([[Blank("text", tokens=3)]])


@pytest.mark.parametrize("scale", [math.nan, math.inf, {"text": math.nan}, "2", True])
def test_a_guidance_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"guidance_scale .* must be a number or a table of numbers"):
        make()([[Given("other", "a"), Blank("text")]], guidance_scale=scale)


def test_number_formats_and_options_of_diffusers(folder):
    for option in ("dtype", "torch_dtype"):
        pipe = MultiDiffPipeline.from_pretrained(folder, **{option: torch.bfloat16}, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.transformer.dtype == torch.bfloat16
        assert pipe([[Blank("text", tokens=3)]]).documents
    assert MultiDiffPipeline.from_pretrained(folder, revision="main", token=False).transformer.dtype == torch.float32
    for options, message in (
        ({"dtype": torch.int64}, "dtype torch.int64 must be torch.float16"),
        ({"dtype": torch.float16, "torch_dtype": torch.float32}, "give dtype alone"),
        ({"variant": "fp16"}, "plain safetensors only"),
        ({"use_safetensors": False}, "plain safetensors only"),
        ({"trust_remote_code": True}, "takes no trust_remote_code; it takes device, dtype"),
        ({"device": "gpu"}, "device gpu cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiDiffPipeline.from_pretrained(folder, **options)


def test_a_repository_of_the_hub_is_fetched_only_by_name(folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipe = MultiDiffPipeline.from_pretrained("user/model", revision="v1", cache_dir="there")
    assert pipe.samplers["text"].config["top_k"] == 5
    ((name, options),) = asked
    assert name == "user/model"
    assert (options["revision"], options["cache_dir"]) == ("v1", "there")
    assert {"model_index.json", "transformer/*", "tokenizers/*"} <= set(options["allow_patterns"])
    for place in ("./user/model", "nowhere", "a/b/c", folder.parent / "user/model", ""):
        with pytest.raises(ValueError, match=r"does not exist|is missing"):
            MultiDiffPipeline.from_pretrained(place)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "user").mkdir()
    folder.rename("user/model")
    MultiDiffPipeline.from_pretrained("user/model")
    for mistyped in ("user/modle", "runs/last.ckpt"):
        with pytest.raises(ValueError, match=f"{mistyped} does not exist or cannot be read"):
            MultiDiffPipeline.from_pretrained(mistyped)
    assert len(asked) == 1


ANSWER = SimpleNamespace(headers={}, request=None)
UNREACHED = {
    "is a gated repository .* Request access at https://huggingface.co/user/model, then": GatedRepoError(
        "403 Client Error.\n\nCannot access gated repo.", response=ANSWER
    ),
    "has no such repository, or it is private. Check the name": RepositoryNotFoundError("404", response=ANSWER),
    "has no revision 'v9' .* Give the name of a branch": RevisionNotFoundError("404", response=ANSWER),
    "is not in the cache, and .* Unset HF_HUB_OFFLINE": OfflineModeIsEnabled("offline"),
    r"could not be downloaded .*\(500 Error. Come back later.\)": HfHubHTTPError(
        "500 Error.\n\nCome back later.\n", response=ANSWER
    ),
    r"could not be downloaded .*\(TimeoutError\)": TimeoutError(),
}


@pytest.mark.parametrize("message", UNREACHED)
def test_what_the_hub_refuses_is_a_sentence_and_what_to_do(message, monkeypatch):
    def download(name, **options):
        raise UNREACHED[message]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"user/model.*{message}") as caught:
        MultiDiffPipeline.from_pretrained("user/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_offline_mode_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"user/model is not a local folder, .* Unset HF_HUB_OFFLINE"):
        MultiDiffPipeline.from_pretrained("user/model", cache_dir=tmp_path)


def test_a_module_becomes_a_pipeline(tmp_path):
    tokenizers = {"text": {"plugin": "bpe"}, "other": {"plugin": "bpe"}}
    module = MaskedDiffusionModule(
        tokenizers,
        {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.9},
        tasks=[{"roles": {"text": "target", "others": "given"}, "condition_dropout": 0.1}],
        samplers={"text": {"canvas": {"tokens": 3}}},
    )
    module.configure_model()
    module.train()
    pipe = MultiDiffPipeline.from_module(module)
    pipe.set_progress_bar_config(disable=True)
    one, two = (pipe([[Blank("text")]], generator=generator()).documents[0][0] for _ in range(2))
    assert torch.equal(one.probs_N, two.probs_N)  # no dropout
    assert module.transformer.training
    assert len(one.codes) <= 3
    assert pipe.transformer is module.transformer
    pipe.save_pretrained(tmp_path / "model")
    live = BPETokenizer()
    assert MultiDiffPipeline.from_module(module, {"text": live, "other": live}).tokenizers["text"] is live


def test_what_cannot_resume_a_training_is_said(folder, tmp_path):
    for word in ("last", "best", "registry:x", "s3://bucket/a.ckpt"):
        check_checkpoint(word)
    torch.save({}, tmp_path / "a.ckpt")
    check_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "sharded").mkdir()
    for name in ("meta.pt", ".metadata"):
        (tmp_path / "sharded" / name).touch()
    check_checkpoint(tmp_path / "sharded")
    (tmp_path / "dangling.ckpt").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-30])
    os.mkfifo(tmp_path / "pipe")
    for place, message in (
        (folder, "is a saved model, which contains no training state"),
        (tmp_path, r"is a folder\. Give --ckpt_path a file, for instance .*/(a|torn)\.ckpt"),
        (tmp_path / "empty", r"is a folder without \.ckpt files"),
        (tmp_path / "absent.ckpt", "absent.ckpt is missing"),
        (tmp_path / "torn.ckpt", "torn.ckpt is truncated"),
        (tmp_path / "pipe", "is a pipe"),
    ):
        with pytest.raises(ValueError, match=message):
            check_checkpoint(place)


@pytest.mark.parametrize(("kind", "count"), [(models, 20), (checkpoints, 10)])
def test_damage_is_refused_in_a_sentence_or_does_no_harm(tmp_path, kind, count):
    state = kind.prepare(tmp_path, Random(1))
    outcomes = {kind.attempt(state, number, Random(f"1/{number}")) for number in range(count)}
    assert outcomes <= {"works", "refused", "refused in generating"}
    assert "refused" in outcomes
