"""`multidiff generate`: fill in the blank segments of a document from the command line.

`generate caption`, `generate image` and `generate audio` are presets. The command parses its arguments before it
imports anything heavy, and it never imports the training stack.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multidiff.cli.errors import UserError, reported, say

if TYPE_CHECKING:
    from multidiff.generation import Blank, Filled, Given, MultiDiffPipeline

_BATCH = 64
_DESCRIPTION = "Fill in the blank segments of a document. Texts are printed, other items are written to files."
_EPILOG = """examples:
  multidiff generate --model runs/demo/model --given text="seven" --fill image
  multidiff generate --model runs/demo/model --given speech=seven.wav --fill image --fill text --num-samples 4
  multidiff generate --model runs/demo/model --fill text --fill image --fill speech:frames=18
  multidiff generate caption --model runs/demo/model picture.png sound.wav
  multidiff generate image --model runs/demo/model --prompt "seven" --output out/
  multidiff generate audio --model runs/demo/model --image picture.png --output out/"""


def main(arguments: Sequence[str], prog: str = "multidiff generate") -> None:
    """Parse a command line and generate.

    Args:
        arguments: the command line after `generate`; it may start with a preset: "caption", "image" or "audio".
        prog: the name of the program in the help.
    """
    preset = arguments[0] if arguments and arguments[0] in _PRESETS else None
    parser = _parser(preset, prog)
    rest, overrides = _overrides(parser, arguments[1:] if preset else arguments)
    options = parser.parse_args(rest)
    with reported(), warnings.catch_warnings():
        warnings.showwarning = partial(_show, warnings.showwarning)
        _generate(preset, options, overrides)


def _show(
    usual: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *rest: Any
) -> None:
    """Show a warning of multidiff or of a plugin as one sentence, and a warning of another library as `usual`."""
    from multidiff import plugins

    modules = (name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == filename)
    if any(map(plugins.is_ours, modules)):
        say(str(message))
    else:
        usual(message, category, filename, *rest)


def _parser(preset: str | None, prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{prog} {preset}" if preset and prog == "multidiff generate" else prog,
        description=_PRESETS[preset] if preset else _DESCRIPTION,
        epilog=None if preset else _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    help_ = "Folder of a saved model, Lightning checkpoint (.ckpt), or repository of the Hugging Face hub (user/model)."
    parser.add_argument("--model", required=True, help=help_)
    if preset == "caption":
        parser.add_argument("files", nargs="+", metavar="FILE", help="Image and audio files.")
    elif preset:
        parser.add_argument("--prompt", metavar="TEXT", help="Text to condition on.")
        parser.add_argument("--image", metavar="FILE", help="Image to condition on.")
        parser.add_argument("--audio", metavar="FILE", help="Audio to condition on.")
    else:
        help_ = "Given segment: text=seven, or image=x.png for a file. Segments keep the order of the command line."
        parser.add_argument("--given", action=_Segment, metavar="NAME=VALUE", dest="segments", help=help_)
        help_ = "Segment to fill in, with an optional size: text, or image:height=32,width=64."
        parser.add_argument("--fill", action=_Segment, metavar="NAME[:SIZE]", dest="segments", help=help_)
    if preset != "caption":
        help_ = "Folder for the generated files (default: out)."
        parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("out"), help=help_)
    help_ = "Number of samples of each document (default: 1)."
    parser.add_argument("--num-samples", metavar="N", type=_positive, default=1, help=help_)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Random seed (default: 0).")
    saved = "(default: as saved with the model)."
    parser.add_argument("--steps", metavar="N", type=_positive, help=f"Number of decoding steps {saved}")
    help_ = f"Scale of classifier-free guidance; 1 turns it off {saved}"
    parser.add_argument("--guidance", metavar="SCALE", type=float, help=help_)
    help_ = f"Sampler setting of the tokenizer NAME, for instance --sampler.text.order=margin {saved}"
    parser.add_argument("--sampler.NAME.KEY", metavar="VALUE", help=help_)
    help_ = "Device to run on, for instance cpu or cuda:1 (default: a GPU if there is one)."
    parser.add_argument("--device", help=help_)
    return parser


def _overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Split off the sampler settings, `--sampler.NAME.KEY=VALUE` or `--sampler.NAME.KEY VALUE`.

    Returns:
        the other arguments, and {tokenizer: {setting: value}}. A value that is not JSON is text.
    """
    rest: list[str] = []
    overrides: dict[str, dict[str, Any]] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--sampler."):
            rest.append(word)
            continue
        key, mark, value = word.partition("=")
        value = value if mark else next(words, "--")
        path = key.split(".")
        if len(path) != 3 or value.startswith("--"):
            parser.error(f"{key}: expected --sampler.NAME.KEY=VALUE, for instance --sampler.text.order=margin")
        try:
            overrides.setdefault(path[1], {})[path[2]] = json.loads(value)
        except (ValueError, RecursionError):
            overrides.setdefault(path[1], {})[path[2]] = value
    return rest, overrides


class _Segment(argparse.Action):
    """Collects --given and --fill in one list, in the order of the command line."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, mark, value = values.partition("=" if option_string == "--given" else ":")
        if option_string == "--given" and not mark:
            parser.error(f"--given {values}: expected NAME=VALUE, for instance text=seven")
        if not getattr(namespace, self.dest):
            setattr(namespace, self.dest, [])
        getattr(namespace, self.dest).append((option_string, name, value))


# What samplers of every kind have.
_SHARED = ("num_inference_steps", "temperature", "guidance_scale", "guidance_schedule", "canvas")


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 999,999,999")
    return int(text)


def _generate(preset: str | None, options: argparse.Namespace, overrides: dict[str, dict[str, Any]]) -> None:
    import torch

    from multidiff.checkpoints import load_sampler, sampler_settings
    from multidiff.generation import MultiDiffPipeline
    from multidiff.seeding import generator_for

    if preset is None and not options.segments:
        message = "There is nothing to fill in. Name segments to fill in with --fill, and given segments with --given."
        raise UserError(message, status=2)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = MultiDiffPipeline.from_pretrained(options.model, device=device)
    for name, settings in overrides.items():
        pipeline.vocabulary.layout(name)
        saved = sampler_settings(name, pipeline.samplers[name])
        if settings.get("sampler", saved["sampler"]) != saved["sampler"]:
            saved = {key: saved[key] for key in _SHARED if saved.get(key) is not None}
        sampler = load_sampler({**saved, **settings}, pipeline.processes.get(name), f"--sampler.{name}")
        pipeline.sequencer.blank(name, sampler.canvas or {})
        pipeline.samplers[name] = sampler
    documents = _documents(preset, options, pipeline)
    total = len(documents) * options.num_samples
    pipeline.set_progress_bar_config(disable=None, leave=False)
    for start in range(0, total, _BATCH):
        batch = range(start, min(start + _BATCH, total))
        output = pipeline(
            [documents[index // options.num_samples] for index in batch],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[generator_for(options.seed, index) for index in batch],
        )
        for index, document in zip(batch, output.documents, strict=True):
            if preset == "caption":
                (made,) = (part for part in document if not part.given)
                caption = " ".join(made.item.split())  # on one line
                print(f"{options.files[index // options.num_samples]}\t{caption}", flush=True)
            else:
                _deliver(document, documents[index // options.num_samples], index, options.output, pipeline)


def _types() -> mimetypes.MimeTypes:
    """File types by suffix, including those that are unknown on a system without `/etc/mime.types`."""
    types = mimetypes.MimeTypes()
    for ending in ("flac", "ogg", "opus"):
        types.add_type(f"audio/{ending}", f".{ending}")
    types.add_type("image/webp", ".webp")
    return types


def _documents(
    preset: str | None, options: argparse.Namespace, pipeline: MultiDiffPipeline
) -> list[list[Given | Blank]]:
    from multidiff.generation import Blank

    if preset == "caption":
        text = _named(pipeline, "text")
        documents = []
        for file in options.files:
            modality = (_types().guess_type(file)[0] or "").split("/")[0]
            if modality not in ("image", "audio"):
                raise ValueError(
                    f"{file}: expected an image or audio file with a suffix such as .png, .jpg, .wav or .flac"
                )
            name = _named(pipeline, modality)
            documents.append(_ordered([_given(pipeline, name, file), Blank(text)], pipeline))
        return documents
    if preset:
        conditions = (("text", options.prompt), ("image", options.image), ("audio", options.audio))
        given = [(_named(pipeline, modality), value) for modality, value in conditions if value is not None]
        return [_ordered([*(_given(pipeline, *pair) for pair in given), Blank(_named(pipeline, preset))], pipeline)]
    parts = []
    for option, name, value in options.segments:
        pipeline.vocabulary.layout(name)
        if option == "--given":
            parts.append(_given(pipeline, name, value))
        else:
            parts.append(Blank(name, **_size(name, value)))
    return [parts]


def _ordered(document: list[Given | Blank], pipeline: MultiDiffPipeline) -> list[Given | Blank]:
    """The segments in an order of the training data, if there is one."""
    places = pipeline.seen.order_of([part.tokenizer for part in document]) if pipeline.seen else None
    return document if places is None else [document[place] for place in places]


def _given(pipeline: MultiDiffPipeline, name: str, value: str) -> Given:
    """The segment of a file or a prompt. A text and its EOS must fit the canvas on which the model writes texts."""
    from multidiff.generation import Given

    item = pipeline.tokenizers[name].read(value, Path())
    canvas = pipeline.samplers[name].canvas
    if isinstance(item, str) and canvas:
        ((unit, room),) = canvas.items()
        length = pipeline.tokenizers[name].encode([item])[0].size[unit]
        if length >= room:
            raise ValueError(f"{value[:40]!r} has {length} {unit}, but texts of this model have at most {room - 1}")
    return Given(name, item)


def _named(pipeline: MultiDiffPipeline, modality: str) -> str:
    """The name of the first tokenizer of a modality."""
    for name, layout in pipeline.vocabulary.tokenizers.items():
        if layout.modality == modality:
            return name
    known = ", ".join(f"{name} ({layout.modality})" for name, layout in pipeline.vocabulary.tokenizers.items())
    raise ValueError(f"This model has no tokenizer for {modality}. Its tokenizers are {known}.")


def _size(name: str, text: str) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(
            f"--fill {name}:{text}: Sizes must be whole numbers, for instance height=32,width=64."
        ) from None


def _deliver(
    document: Sequence[Filled], asked: Sequence[Given | Blank], index: int, folder: Path, pipeline: MultiDiffPipeline
) -> None:
    """Print a text; write any other item to a file and print its path."""
    from multidiff.files import naming
    from multidiff.generation import Given

    made = [part for part, request in zip(document, asked, strict=True) if not isinstance(request, Given)]
    for place, part in enumerate(made):
        if isinstance(part.item, str):
            print(part.item, flush=True)
        else:
            again = sum(other.tokenizer == part.tokenizer for other in made[:place])
            stem = folder / (f"{part.tokenizer}-{index:03d}" + (f"-{again}" if again else ""))
            with naming(stem):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    path = pipeline.tokenizers[part.tokenizer].write(part.item, stem)
                except RuntimeError as error:  # for instance from an image or audio library, when the disk is full
                    raise OSError(str(error)) from error
            print(path, flush=True)


_PRESETS = {
    "caption": "Caption images and audio. Each line of the output is FILE<TAB>CAPTION.",
    "image": "Generate images from text, images and audio in any combination, or unconditionally.",
    "audio": "Generate audio from text, images and audio in any combination, or unconditionally.",
}
