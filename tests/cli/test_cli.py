"""The command line: quick help, presets and their general form, errors of one line."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from multidiff import MaskedDiffusionTransformer, MaskSampler, MultiDiffPipeline, SharedVocabulary
from multidiff.cli import main, precision
from multidiff_bpe import BPETokenizer
from multidiff_encodec import EncodecTokenizer
from multidiff_vq import VQTokenizer
from tests.helpers.paths import ROOT
from tests.helpers.toys import generator

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizers = {"text": BPETokenizer(), "image": VQTokenizer(), "speech": EncodecTokenizer()}
    vocabulary = SharedVocabulary.of(tokenizers)
    transformer = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=1, num_heads=2)
    transformer.initialize(generator())
    samplers = {
        "text": MaskSampler(canvas={"tokens": 5}, num_inference_steps=3),
        "image": MaskSampler(num_inference_steps=3),
        "speech": MaskSampler(canvas={"frames": 8}, num_inference_steps=3),
    }
    folder = tmp_path_factory.mktemp("cli") / "model"
    MultiDiffPipeline(transformer.eval(), vocabulary, tokenizers, samplers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (32, 32), "white").save(folder / "a.png")
    soundfile.write(folder / "b.wav", torch.rand(22050, 2, generator=generator()).numpy() - 0.5, 44100)
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(folder / "empty.wav", torch.zeros(0).numpy(), 8000)
    Image.new("L", (33, 40)).save(folder / "odd.png")
    (folder / "notes.txt").write_text("seven")
    return folder


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate", "caption", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from multidiff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'numpy', 'jsonargparse'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout


def test_generating_does_not_import_the_training_stack(model):
    code = (
        "import sys; from multidiff.cli.generate import main; "
        f"main(['caption', '--model', {str(model)!r}, sys.argv[1]]); "
        "assert 'lightning' not in sys.modules and 'jsonargparse' not in sys.modules"
    )
    picture = model.parent / "x.png"
    Image.new("L", (32, 32)).save(picture)
    subprocess.run([sys.executable, "-c", code, str(picture)], check=True, capture_output=True)


def test_plugins_lists_the_first_party_without_importing_their_models():
    code = (
        "import sys; from multidiff.cli import main; main(['plugins'])\n"
        "heavy = {'transformers', 'diffusers', 'lightning', 'jsonargparse'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    modalities = {"bpe": "text", "vq": "image", "codec": "audio", "encodec": "audio", "grid": "grid"}
    assert all(lines[name][0] == modality and lines[name][-1] == "works" for name, modality in modalities.items())


def test_captions(model, files, capsys):
    main(
        ["generate", "caption", "--model", str(model), str(files / "a.png"), str(files / "b.wav"), "--num-samples", "2"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        str(files / name) for name in ("a.png", "a.png", "b.wav", "b.wav")
    ]


def test_images_from_every_condition(model, files, tmp_path, capsys):
    conditions = ["--prompt", "one", "--audio", str(files / "b.wav"), "--image", str(files / "a.png")]
    options = ["--num-samples", "3", "--output", str(tmp_path), "--guidance", "2", "--steps", "2"]
    main(["generate", "image", "--model", str(model), *conditions, *options])
    written = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in written] == ["image-000.png", "image-001.png", "image-002.png"]
    for line in written:
        with Image.open(line) as image:
            assert image.size == (32, 32)


def test_audio_and_seed(model, tmp_path, capsys):
    sounds = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(
            [
                "generate",
                "audio",
                "--model",
                str(model),
                "--prompt",
                "x",
                "--seed",
                seed,
                "--output",
                str(tmp_path / name),
            ]
        )
        (path,) = capsys.readouterr().out.splitlines()
        sounds.append(Path(path).read_bytes())
    assert sounds[0] == sounds[1]
    assert sounds[0] != sounds[2]


def test_general_form_keeps_the_order_of_segments(model, files, tmp_path, capsys):
    main(["generate", "--model", str(model), "--fill", "speech:frames=6", "--given", f"image={files / 'a.png'}",
          "--fill", "text", "--fill", "image:height=16,width=24", "--output", str(tmp_path)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "speech-000.wav")
    assert lines[-1] == str(tmp_path / "image-000.png")
    with Image.open(lines[-1]) as image:
        assert image.size == (24, 16)


def test_scripts_are_the_presets(model, files, tmp_path):
    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    printed = run(ROOT / "scripts/generate_captions.py", "--model", model, files / "a.png")
    assert printed.startswith(f"{files / 'a.png'}\t")
    assert "--guidance" in run(ROOT / "scripts/generate_images.py", "--help")
    assert "--image" in run(ROOT / "scripts/generate_audio.py", "--help")


def test_decoding_settings_on_the_command_line(model, files, capsys):
    def caption(*options):
        main(["generate", "caption", "--model", str(model), str(files / "a.png"), *options])
        return capsys.readouterr().out.split("\t")[1]

    plain = caption()
    assert caption("--sampler.text.temperature=0", "--sampler.text.order", "margin") == caption(
        "--sampler.text.temperature=0", "--sampler.text.order=margin", "--seed", "9"
    )
    everything_but_zero = ",".join(str(code) for code in range(1, 257))
    assert caption(f"--sampler.text.suppress_tokens=[{everything_but_zero}]").strip() == "!" * 5
    main(["generate", "caption", "--model", str(model), "--sampler.text.temperature", "0", str(files / "a.png")])
    assert capsys.readouterr().out.split("\t")[1] == caption("--sampler.text.temperature=0")
    order = "--sampler.text.order"
    for wrong in ([order], ["--sampler.text=1"], [order, "--seed", "1"], ["--sam", "1"]):
        with pytest.raises(SystemExit):
            caption(*wrong)
        assert "--sam" in capsys.readouterr().err
    assert caption("--sampler.text.unmasking=linear", "--sampler.text.block_length=2") != plain
    assert caption() == plain


BAD = {
    "no such.png does not exist|no such.png": ["caption", "no such.png"],
    r"broken.png": ["caption", "broken.png"],
    r"broken.wav": ["caption", "broken.wav"],
    r"empty.wav|empty|no samples": ["caption", "empty.wav"],
    "notes.txt: expected an image or audio file": ["caption", "notes.txt"],
    "33": ["caption", "odd.png"],
    "no tokenizer is called 'smell'": ["--fill", "smell"],
    "no room|larger": ["--fill", "text:tokens=0"],
    "Sizes must be whole numbers": ["--fill", "image:height=big"],
    "--sampler.text: no sampler setting is called 'ordr'; did you mean 'order'": [
        "--sampler.text.ordr=1",
        "--fill",
        "text",
    ],
    "--sampler.text: order 'best' must be one of random, confidence": ["--sampler.text.order=best", "--fill", "text"],
    "guidance_scale nan must be a number": ["--given", "text=x", "--fill", "image", "--guidance", "nan"],
    "guidance_scale inf must be a number": ["--given", "text=x", "--fill", "image", "--guidance", "inf"],
    "--sampler.text: temperature nan must be a number": ["--sampler.text.temperature=NaN", "--fill", "text"],
    "--sampler.text: temperature .* must be a number": [f"--sampler.text.temperature={'[' * 9_000}", "--fill", "text"],
    "canvas of text of size": ['--sampler.text.canvas={"frames": 3}', "--fill", "text"],
    "notes.txt/image-000 cannot be written": ["--fill", "image", "--output", "notes.txt"],
    "/proc/none/image-000 cannot be written": ["--fill", "image", "--output", "/proc/none"],
    "device gpu cannot be used": ["--fill", "text", "--device", "gpu"],
    "no tokenizer is called 'nose'": ["--sampler.nose.order=random", "--fill", "text"],
}


@pytest.mark.parametrize("message", BAD)
def test_errors_are_short_and_say_what_to_do(model, files, monkeypatch, message):
    monkeypatch.chdir(files)
    arguments = BAD[message]
    preset, rest = (arguments[:1], arguments[1:]) if arguments[:1] == ["caption"] else ([], arguments)
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["generate", *preset, "--model", str(model), *rest])
    assert str(stopped.value).count("\n") <= 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Error: flush failed")])
def test_a_full_disk_is_a_sentence(model, tmp_path, monkeypatch, error):
    def fail(tokenizer, item, stem):
        raise error

    monkeypatch.setattr(VQTokenizer, "write", fail)
    with pytest.raises(SystemExit, match=r"multidiff: .*image-000 cannot be written \((No space left|Error: flush)"):
        main(["generate", "--model", str(model), "--fill", "image", "--output", str(tmp_path)])


def test_output_that_nobody_takes_is_a_sentence(model, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match=r"multidiff: .*No space left on device"):
            main(["generate", "--model", str(model), "--fill", "text"])
        full.write("what comes after goes nowhere")


def test_only_our_own_warnings_are_a_sentence(model, capsys, monkeypatch):
    read = BPETokenizer.read

    def ours(tokenizer, value, folder):
        warnings.warn_explicit("take care", UserWarning, read.__code__.co_filename, 7)
        warnings.warn_explicit("of numpy", UserWarning, np.__file__, 7)
        return read(tokenizer, value, folder)

    monkeypatch.setattr(BPETokenizer, "read", ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["generate", "--model", str(model), "--given", "text=a", "--fill", "text"])
    assert [str(warning.message) for warning in caught] == ["of numpy"]
    assert capsys.readouterr().err == "multidiff: take care\n"


def test_a_run_is_overwritten_by_fit_alone(capsys):
    for command in ("validate", "test"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--config", str(ROOT / "configs" / "digits.yaml"), "--overwrite", "true"])
        assert stopped.value.code == 2
        assert "--overwrite" in capsys.readouterr().err


def test_numbers_of_samples_and_steps(model, capsys):
    for wrong in ("0", "-1", "1e5", "x", "9" * 5000):
        with pytest.raises(SystemExit):
            main(["generate", "--model", str(model), "--fill", "text", "--num-samples", wrong])
        assert "is not a whole number from 1" in capsys.readouterr().err


def test_a_prompt_longer_than_its_canvas_is_refused(model):
    with pytest.raises(SystemExit, match="has 6 tokens, but texts of this model have at most 4"):
        main(["generate", "image", "--model", str(model), "--prompt", "sevens"])


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("multidiff: There is no command 'train'. The commands are fit,")
    with pytest.raises(SystemExit, match="does not exist"):
        main(["generate", "caption", "--model", "nowhere", "a.png"])


def test_generating_nothing_is_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", "nowhere"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("multidiff: There is nothing to fill in. Name segments to fill in with")


@pytest.mark.parametrize("command", ["generate", "generate image", "consolidate", "plugins", "new-tokenizer", "test"])
def test_every_command_has_help(command, capsys):
    main(["--help"])
    assert f"\n  {command.split()[0]}  " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: multidiff {command} ")
    assert "Show this help message and exit." in printed


def test_one_module_prints_errors_and_exits():
    for file in (ROOT / "multidiff" / "cli").glob("*.py"):
        code = file.read_text(encoding="utf-8")
        ends = [word for word in ("sys.exit", "sys.stderr", "SystemExit", "os._exit") if word in code]
        assert bool(ends) == (file.name == "errors.py"), (file.name, ends)


CONFIG = """
model:
  class_path: multidiff.training.MaskedDiffusionModule
  init_args: {tokenizers: {text: {plugin: bpe}}, tasks: [{roles: {others: target}}]}
data:
  class_path: multidiff.data.DocumentDataModule
  init_args: {source: data, tokenizers: "${model.init_args.tokenizers}"}
"""
MODULE, HELP = "model: multidiff.training.MaskedDiffusionModule: ", "Run `multidiff fit --help` for the options."
MODULE_HELP = "Run `multidiff fit --model.help multidiff.training.MaskedDiffusionModule` for the options."
WRONG = {
    "option": (["--trainer.max_stps", "1"], "", f"max_stps 1. Did you mean --trainer.max_steps? {HELP}"),
    "key": ([], "trainer: {max_stps: 1}", f"option 'trainer.max_stps'. Did you mean trainer.max_steps? {HELP}"),
    "argument": (
        ["--model.init_args.warmup_step", "1"],
        "",
        f"{MODULE}Option 'warmup_step' is not accepted. Did you mean warmup_steps? {MODULE_HELP}",
    ),
    "value": (
        [],
        ("others: target", "others: targt"),
        f"Task: roles: expected one of ['target', 'given', 'absent', 'removed'], got targt. {MODULE_HELP}",
    ),
    "type": (["--trainer.max_steps", "few"], "", f"trainer.max_steps: expected int, got few. {HELP}"),
    "class": ([], ("MaskedDiffusionModule", "Masked"), f"has no attribute 'Masked'. {HELP}"),
    "link": ([], ("args.tokenizers}", "args.tokens}"), "Interpolation key '...model.init_args.tokens' not found"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_training_is_a_sentence_and_what_to_do(name, tmp_path, capsys):
    arguments, change, message = WRONG[name]
    (tmp_path / "a.yaml").write_text(CONFIG.replace(*change) if isinstance(change, tuple) else CONFIG + change)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "a.yaml"), *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("multidiff: ")
    assert said.count("\n") == 1
    assert message in said


def test_a_training_needs_a_configuration(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "required: --config FILE or --config NAME. The shipped configurations are digits, emoji, " in said


@pytest.mark.parametrize(
    ("arguments", "explained"),
    [
        ([], {"--model.init_args.tasks", "--data.init_args.max_eos_padding"}),
        (["--config", "digits"], {"--model.init_args.tokenizers", "--data.init_args.on_error"}),
        (["--config", "vq_digits"], {"--model.init_args.revive_below", "--data.init_args.channels"}),
        (["--config=vq_digits"], {"--model.init_args.revive_below", "--data.init_args.channels"}),
    ],
)
def test_help_explains_the_options_of_model_and_data(arguments, explained, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    words = set(printed.split())
    assert explained <= words
    assert {"--trainer.max_steps", "--model.help", "--data.help", "tokenizers/vq_digits"} <= words
    assert ("--model.init_args.tasks" in words) == ("vq_digits" not in str(arguments))


def test_what_the_system_refuses_is_a_sentence(model, files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^multidiff: .*image-000 cannot be written \(Not a directory\)$"):
        main(["generate", "--model", str(model), "--fill", "image", "--output", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit, match=r"^multidiff: .*file.* cannot be written \(File exists\)$"):
        main(["new-tokenizer", "tide", "--output", str(tmp_path / "file" / "tide")])


def test_ctrl_c_and_a_bug_are_told_apart(monkeypatch, capsys):
    def raises(error):
        def listing(arguments):
            raise error

        monkeypatch.setattr("multidiff.cli.plugins.main", listing)

    raises(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        main(["plugins"])
    assert (stopped.value.code, capsys.readouterr().err) == (130, "multidiff: interrupted\n")
    raises(OSError(28, "No space left on device"))
    with pytest.raises(SystemExit, match=r"^multidiff: No space left on device$"):
        main(["plugins"])
    raises(ValueError("a bug of another package"))
    with pytest.raises(ValueError, match="a bug"):
        main(["plugins"])


@pytest.mark.parametrize(("slow", "chosen"), [(torch.float32, "bf16-mixed"), (torch.bfloat16, "32-true")])
def test_precision_is_the_faster_one(monkeypatch, slow, chosen):
    clock = [0.0]

    class Factor:
        def __init__(self, *shape, dtype, device):
            self.seconds = 2.0 if dtype == slow else 1.0

        def __matmul__(self, other):
            clock[0] += self.seconds
            return torch.zeros(1, 1)

    monkeypatch.setattr(torch, "ones", Factor)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    assert precision._measured_precision() == chosen
