"""Judge a tokenizer on the items of a data folder: what it costs, what it keeps, how much of its codebooks it uses.

    python scripts/evaluate.py tokenizer --data runs/demo/data --name image --tokenizer '{"plugin": "vq"}'

Prints a table and ends with one line of JSON. STOI and PESQ are among the numbers where pystoi and pesq are installed,
LPIPS where torchvision's weights of AlexNet, VGG-16 or SqueezeNet 1.1 are in torch's hub folder; nothing is downloaded.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from torchaudio.functional import resample
from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality
from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multidiff import Audio, Codes, ModalityTokenizer, plugins
from multidiff.data.folder import file_states, read_metadata
from multidiff_encodec.mel import MelLoss
from multidiff_sound import SoundTokenizer
from multidiff_sound.sound import to_mono
from multidiff_vq import VQTokenizer
from multidiff_vq.pictures import to_pixels

_BACKBONES: dict[Literal["alex", "vgg", "squeeze"], str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def tokenizer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every number of one tokenizer, by what it says."""
    made = plugins.build({arguments.name: arguments.tokenizer})[arguments.name]
    made.to("cuda" if torch.cuda.is_available() else "cpu")
    values = _values(arguments, arguments.split)[: arguments.num_samples]
    # In the order in which a data folder is tokenized.
    states = file_states(arguments.data, values)
    values.sort(key=lambda value: states.get(str(value), (0, 0))[0], reverse=True)
    items = [made.read(value, arguments.data) for value in tqdm(values, desc="reading", leave=False)]
    if isinstance(made, VQTokenizer):  # what is restored has the size that was encoded
        items = [made.prepared(item) for item in items]
    codes, encoding = _timed(made.encode, items, arguments.batch, "encoding")
    restored, decoding = _timed(made.decode, codes, arguments.batch, "decoding")
    again, _ = _timed(made.encode, restored, arguments.batch, "encoding again")
    tokens = sum(map(len, codes))
    bare = _bare(made, items, codes, arguments.batch)
    found: dict[str, Any] = {
        "items": len(items),
        "codes an item": tokens / len(items),
        "bits an item": sum(_bits(made, one) for one in codes) / len(items),
        "codes a second, encoded": tokens / encoding,
        "codes a second, decoded": tokens / decoding,
        **{
            f"as fast as the bare model, {what}": bare[what] / seconds
            for what, seconds in (("encoded", encoding), ("decoded", decoding))
            if bare
        },
        "codes that come back, decoded and encoded": _agreement(codes, again),
        "saved and loaded, gives the same codes": _survives(made, items[: arguments.batch], codes),
    }
    for level, size in enumerate(made.codebook_sizes):
        ids_N = torch.cat([one.ids_N[one.levels_N == level] for one in codes])
        share_V = torch.bincount(ids_N, minlength=size) / max(1, len(ids_N))
        entropy = float(torch.special.entr(share_V).sum())
        found[f"level {level}: codes in use, of {size}"] = float((share_V > 0).float().mean())
        found[f"level {level}: entropy, nats of {math.log(size):.2f}"] = entropy
    found |= _quality(items, restored)
    if arguments.judge:
        found |= _judged(made, arguments, values, items, restored)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    return found


def _values(arguments: argparse.Namespace, split: str) -> list[Any]:
    """How metadata.jsonl names the items of a split, each once."""
    records = read_metadata(arguments.data, (split,))
    values = {json.dumps(value): value for record in records for key, value in record.segments if key == arguments.name}
    if not values:
        raise ValueError(f"{arguments.data}: no document of split {split} has a segment {arguments.name!r}")
    return list(values.values())


def _timed(call: Callable[[list[Any]], list[Any]], inputs: list[Any], size: int, what: str) -> tuple[list[Any], float]:
    outputs, seconds = [], 0.0
    call(inputs[:size])  # warm up
    for start in tqdm(range(0, len(inputs), size), desc=what, leave=False):
        begun = time.perf_counter()
        outputs += call(inputs[start : start + size])
        seconds += time.perf_counter() - begun
    return outputs, seconds


def _bare(made: ModalityTokenizer, items: list[Any], codes: list[Codes], size: int) -> dict[str, float]:
    """Seconds of the neural network alone, on tensors that are ready, in batches of equal shape; none for others."""
    if isinstance(made, VQTokenizer):
        inputs = [to_pixels(item) for item in items]
        grids = [one.ids_N.reshape(one.size["height"] // made.stride, -1) for one in codes]
        calls = {"encoded": (made.ids_of, inputs), "decoded": (made.pixels_of, grids)}
    elif isinstance(made, SoundTokenizer):
        waves = [to_mono(item, made.sample_rate) for item in items]
        padded = [torch.nn.functional.pad(wave_T, (0, -len(wave_T) % made.hop)) for wave_T in waves]
        grids = [one.ids_N.reshape(-1, len(made.codebook_sizes)) for one in codes]
        calls = {"encoded": (made.ids_of, padded), "decoded": (made.samples_of, grids)}
    else:
        return {}
    device, seconds = next(made.model.parameters()).device, {}
    for what, (call, tensors) in calls.items():
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_shape.setdefault(tensor.shape, []).append(tensor)
        batches = [torch.stack(same[start : start + size]).to(device)
                   for same in by_shape.values() for start in range(0, len(same), size)]  # fmt: skip
        with torch.no_grad():
            call(batches[0])
            begun = time.perf_counter()
            for batch in batches:
                call(batch).cpu()
            seconds[what] = time.perf_counter() - begun
    return seconds


def _bits(made: ModalityTokenizer, codes: Codes) -> float:
    return float(torch.tensor(made.codebook_sizes, dtype=torch.float64)[codes.levels_N].log2().sum())


def _agreement(codes: list[Codes], again: list[Codes]) -> float:
    """Share of codes that are the same after a round trip through the item; none where the size has changed."""
    same = sum(int((a.ids_N == b.ids_N).sum()) for a, b in zip(codes, again, strict=True) if len(a) == len(b))
    return same / max(1, sum(map(len, codes)))


def _survives(made: ModalityTokenizer, items: list[Any], codes: list[Codes]) -> bool:
    with TemporaryDirectory() as folder:
        made.save(Path(folder))
        loaded = type(made).load(Path(folder))
    same = loaded.fingerprint == made.fingerprint
    pairs = zip(loaded.encode(items), codes[: len(items)], strict=True)
    return same and all(torch.equal(a.ids_N, b.ids_N) for a, b in pairs)


def _judged(
    made: ModalityTokenizer, arguments: argparse.Namespace, values: list[Any], items: list[Any], restored: list[Any]
) -> dict[str, float]:
    """Share of items in which a classifier, trained on the originals of the training split, finds their class, before
    and after the tokenizer."""
    from demo.judges import ColourJudge, ImageJudge, SpeechJudge

    kinds = {Image.Image: ImageJudge if getattr(items[0], "mode", "") == "L" else ColourJudge, Audio: SpeechJudge}
    judge = next((judge for kind, judge in kinds.items() if isinstance(items[0], kind)), None)
    if judge is None:
        raise ValueError(f"--judge {arguments.judge}: only pictures and sounds can be judged")
    class_of: dict[str, Any] = {}
    for record in read_metadata(arguments.data, ("train", arguments.split)):
        named = dict(record.segments).get(arguments.judge)
        for key, value in record.segments:
            if key == arguments.name and named is not None:
                class_of[json.dumps(value)] = named
    learned = [value for value in _values(arguments, "train") if json.dumps(value) in class_of]
    classes = sorted({class_of[json.dumps(value)] for value in learned})
    if len(classes) < 2:
        raise ValueError(
            f"{arguments.data}: segments {arguments.judge!r} beside {arguments.name!r} name no two classes"
        )
    labels = [classes.index(class_of[json.dumps(value)]) for value in learned]
    originals = [made.read(value, arguments.data) for value in tqdm(learned, desc="reading", leave=False)]
    fitted = judge.fit(originals, labels, seed=0)
    known = [index for index, value in enumerate(values) if class_of.get(json.dumps(value)) in classes]
    if not known:
        raise ValueError(f"{arguments.data}: no item of split {arguments.split} is of a class of the training split")
    expected = torch.tensor([classes.index(class_of[json.dumps(values[index])]) for index in known])
    real, kept = (
        float((fitted.predict([some[index] for index in known]) == expected).float().mean())
        for some in (items, restored)
    )
    return {
        f"classes, of {len(known)} items": len(classes),
        "class found in originals": real,
        "class found after the tokenizer": kept,
        "the latter, share of the former": kept / max(real, 1e-9),
    }


def _quality(items: list[Any], restored: list[Any]) -> dict[str, float]:
    """What is kept, by what the items are; nothing for those that only their plugin knows."""
    pairs = list(zip(items, restored, strict=True))
    if isinstance(items[0], str):
        exact = sum(one == other for one, other in pairs) / len(pairs)
        return {"texts that come back unchanged": exact, "characters an item": sum(map(len, items)) / len(items)}
    if isinstance(items[0], Image.Image):
        scores = [_picture(one, other) for one, other in tqdm(pairs, desc="comparing", leave=False)]
    elif isinstance(items[0], Audio):
        scores = [_sound(one, other) for one, other in tqdm(pairs, desc="comparing", leave=False)]
    else:
        return {}
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _picture(item: Image.Image, restored: Image.Image) -> dict[str, float]:
    if item.has_transparency_data:
        item = Image.alpha_composite(Image.new("RGBA", item.size, "white"), item.convert("RGBA"))
    one_1CHW, other_1CHW = (
        pil_to_tensor(picture.convert(restored.mode)).float()[None] / 255 for picture in (item, restored)
    )
    return {
        **_lpips(one_1CHW, other_1CHW),
        "PSNR, dB": float(peak_signal_noise_ratio(other_1CHW, one_1CHW, data_range=1.0)),
        "SSIM": float(structural_similarity_index_measure(other_1CHW, one_1CHW, data_range=1.0)),  # pyright: ignore[reportArgumentType]
    }


def _lpips(one_1CHW: torch.Tensor, other_1CHW: torch.Tensor) -> dict[str, float]:
    found = _backbone(Path(torch.hub.get_dir()) / "checkpoints")
    if found is None:
        return {}
    name, measure = found
    pair = (picture.expand(1, 3, -1, -1) for picture in (other_1CHW, one_1CHW))
    return {f"LPIPS, {name}": float(measure(*pair))}


@cache
def _backbone(checkpoints: Path) -> tuple[str, LearnedPerceptualImagePatchSimilarity] | None:
    """LPIPS with the first network whose weights torchvision has downloaded before; nothing is downloaded here."""
    for name, file in _BACKBONES.items():
        if (checkpoints / file).is_file():
            return name, LearnedPerceptualImagePatchSimilarity(name, normalize=True)
    return None


def _sound(item: Audio, restored: Audio) -> dict[str, float]:
    rate = restored.sample_rate
    one_T = resample(item.waveform.mean(0), item.sample_rate, rate)
    other_T = restored.waveform.mean(0)[: len(one_T)]
    other_T = torch.nn.functional.pad(other_T, (0, len(one_T) - len(other_T)))
    scores = {"mel distance": float(MelLoss(rate)(other_T[None], one_T[None]))}
    if find_spec("pystoi"):
        scores["STOI"] = float(short_time_objective_intelligibility(other_T, one_T, rate))
    if find_spec("pesq") and rate in (8_000, 16_000):
        mode = "nb" if rate == 8_000 else "wb"
        scores["PESQ"] = float(perceptual_evaluation_speech_quality(other_T, one_T, rate, mode))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="tokenizer")
    one = commands.add_parser("tokenizer", help="what it costs, keeps and uses")
    one.add_argument("--tokenizer", type=json.loads, required=True, help='as in YAML: {"plugin": "vq", …}')
    one.add_argument("--name", required=True, help="its key in the data folder's metadata.jsonl")
    one.add_argument("--data", type=Path, required=True, help="a data folder")
    one.add_argument("--split", default="test", help="train, validation or test (default: test)")
    one.add_argument("--num-samples", type=int, default=1000, help="the most items (default: 1000)")
    one.add_argument("--batch", type=int, default=256, help="items at a time (default: 256)")
    one.add_argument(
        "--judge", metavar="KEY", help="segment that is the class of an item, not a caption: how well it is kept"
    )
    one.set_defaults(run=tokenizer)
    arguments = parser.parse_args()
    try:
        print(json.dumps(arguments.run(arguments)))
    except (ValueError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
