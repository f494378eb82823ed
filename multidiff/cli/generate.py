"""`multidiff generate`: fill in the blanks of a document from the command line.

One implementation for any tokenizers; `generate caption`, `generate image` and `generate audio` are presets of it.
Parses before it imports anything heavy, and never imports the training stack.
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

from multidiff.cli.errors import reported

if TYPE_CHECKING:
    from multidiff.generation.pipeline import Blank, Filled, Given, MultiDiffPipeline

_BATCH = 64
_EPILOG = """examples:
  multidiff generate --model runs/demo/model --given text="seven" --fill image
  multidiff generate --model runs/demo/model --given speech=seven.wav --fill image --fill text --num-samples 4
  multidiff generate --model runs/demo/model --fill text --fill image --fill speech:frames=18
  multidiff generate caption --model runs/demo/model picture.png sound.wav
  multidiff generate image --model runs/demo/model --prompt "seven" --output out/
  multidiff generate audio --model runs/demo/model --image picture.png --output out/"""


def main(arguments: Sequence[str], prog: str = "multidiff generate") -> None:
    """Parse `arguments` and generate; the first may name a preset: "caption", "image" or "audio"."""
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
    """A warning of multidiff or of a plugin as a sentence, without its line of code; of other libraries as `usual`."""
    from multidiff import plugins

    modules = (name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == filename)
    if any(map(plugins.is_ours, modules)):
        print(f"multidiff: {message}", file=sys.stderr)
    else:
        usual(message, category, filename, *rest)


def _parser(preset: str | None, prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{prog} {preset}" if preset and prog == "multidiff generate" else prog,
        description=_PRESETS[preset] if preset else "Fill in the blanks of a document of any modalities.",
        epilog=None if preset else _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder of a saved model, or a Lightning checkpoint (.ckpt)")
    if preset == "caption":
        parser.add_argument("files", nargs="+", metavar="FILE", help="pictures or sound files")
    elif preset:
        parser.add_argument("--prompt", metavar="TEXT", help="text to follow")
        parser.add_argument("--image", metavar="FILE", help="picture to follow")
        parser.add_argument("--audio", metavar="FILE", help="sound to follow")
    else:
        help_ = "a segment that is there, e.g. text=seven or image=x.png; the order of segments is kept"
        parser.add_argument("--given", action=_Segment, metavar="NAME=VALUE", dest="segments", help=help_)
        help_ = "a segment to fill in, with a size if wanted, e.g. text, image:height=32,width=64"
        parser.add_argument("--fill", action=_Segment, metavar="NAME[:SIZE]", dest="segments", help=help_)
    if preset != "caption":
        parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the files (default: out)")
    parser.add_argument("--num-samples", type=_positive, default=1, help="samples of each document (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: 0)")
    saved = "(default: as saved with the model)"
    parser.add_argument("--steps", type=_positive, help=f"decoding steps {saved}")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance, 1 is none {saved}")
    help_ = f"a decoding setting of tokenizer NAME, e.g. --sampler.text.order=margin {saved}"
    parser.add_argument("--sampler.NAME.KEY", metavar="VALUE", help=help_)
    parser.add_argument("--device", help="where to run (default: a GPU if there is one)")
    return parser


def _overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The other arguments, and {tokenizer: {setting: value}} of `--sampler.NAME.KEY=VALUE`, or with a space for the =;
    values are JSON where they can be read as such, else text."""
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
            parser.error(f"{key}: write --sampler.NAME.KEY=VALUE, for instance --sampler.text.order=margin")
        try:
            overrides.setdefault(path[1], {})[path[2]] = json.loads(value)
        except (ValueError, RecursionError):
            overrides.setdefault(path[1], {})[path[2]] = value
    return rest, overrides


class _Segment(argparse.Action):
    """Collects --given and --fill in one list, in the order in which they stand."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, mark, value = values.partition("=" if option_string == "--given" else ":")
        if option_string == "--given" and not mark:
            parser.error(f"--given {values}: write NAME=VALUE, for instance text=seven")
        if not getattr(namespace, self.dest):
            setattr(namespace, self.dest, [])
        getattr(namespace, self.dest).append((option_string, name, value))


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 999,999,999")
    return int(text)


def _generate(preset: str | None, options: argparse.Namespace, overrides: dict[str, dict[str, Any]]) -> None:
    import torch

    from multidiff.generation.pipeline import MultiDiffPipeline
    from multidiff.samplers import MaskSampler
    from multidiff.seeding import generator_for

    if preset is None and not options.segments:
        raise ValueError("nothing to do: name what is there with --given and what to fill in with --fill")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = MultiDiffPipeline.from_pretrained(options.model, device=device)
    for name, settings in overrides.items():
        pipeline.vocabulary.layout(name)
        changed = {**pipeline.samplers[name].settings, **settings}
        sampler = MaskSampler.from_settings(changed, f"--sampler.{name}")
        pipeline.sequencer.blank(name, sampler.config["canvas"] or {})
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
                caption = " ".join(made.item.split())  # one line, whatever it holds
                print(f"{options.files[index // options.num_samples]}\t{caption}", flush=True)
            else:
                _deliver(document, documents[index // options.num_samples], index, options.output, pipeline)


def _types() -> mimetypes.MimeTypes:
    """File types by ending, with those that a system without `/etc/mime.types` does not know."""
    types = mimetypes.MimeTypes()
    for ending in ("flac", "ogg", "opus"):
        types.add_type(f"audio/{ending}", f".{ending}")
    types.add_type("image/webp", ".webp")
    return types


def _documents(
    preset: str | None, options: argparse.Namespace, pipeline: MultiDiffPipeline
) -> list[list[Given | Blank]]:
    from multidiff.generation.pipeline import Blank

    if preset == "caption":
        text = _named(pipeline, "text")
        documents = []
        for file in options.files:
            modality = (_types().guess_type(file)[0] or "").split("/")[0]
            if modality not in ("image", "audio"):
                raise ValueError(f"{file}: its name ends like neither a picture nor a sound (.png, .jpg, .wav, .flac)")
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
    """The segments in an order that the model was trained on, where there is one."""
    places = pipeline.seen.order_of([part.tokenizer for part in document]) if pipeline.seen else None
    return document if places is None else [document[place] for place in places]


def _given(pipeline: MultiDiffPipeline, name: str, value: str) -> Given:
    """What a file or a prompt holds. A text must fit the canvas that the model writes texts on, its end included."""
    from multidiff.generation.pipeline import Given

    item = pipeline.tokenizers[name].read(value, Path())
    canvas = pipeline.samplers[name].config["canvas"]
    if isinstance(item, str) and canvas:
        ((unit, room),) = canvas.items()
        length = pipeline.tokenizers[name].encode([item])[0].size[unit]
        if length >= room:
            raise ValueError(f"{value[:40]!r} takes {length} {unit}, but this model's texts have at most {room - 1}")
    return Given(name, item)


def _named(pipeline: MultiDiffPipeline, modality: str) -> str:
    """The first tokenizer of a modality."""
    for name, layout in pipeline.vocabulary.tokenizers.items():
        if layout.modality == modality:
            return name
    known = ", ".join(f"{name} ({layout.modality})" for name, layout in pipeline.vocabulary.tokenizers.items())
    raise ValueError(f"this model has no tokenizer for {modality}; it has {known}")


def _size(name: str, text: str) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(
            f"--fill {name}:{text}: write sizes as whole numbers, for instance height=32,width=64"
        ) from None


def _deliver(
    document: Sequence[Filled], asked: Sequence[Given | Blank], index: int, folder: Path, pipeline: MultiDiffPipeline
) -> None:
    """Print texts, write everything else and print its path."""
    from multidiff.files import naming
    from multidiff.generation.pipeline import Given

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
                except RuntimeError as error:  # what libraries of pictures and sounds say of a full disk, for instance
                    raise OSError(str(error)) from error
            print(path, flush=True)


_PRESETS = {
    "caption": "Caption pictures and sounds: prints FILE<TAB>caption, one a line.",
    "image": "Make pictures from a text, a picture, a sound, any of them together, or from nothing.",
    "audio": "Make sounds from a text, a picture, a sound, any of them together, or from nothing.",
}
