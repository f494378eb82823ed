"""Evaluate a tokenizer on the items of a data folder: cost, speed, quality of reconstruction and use of its codebooks.
Or evaluate a model: the likelihood of the documents of a data folder, how many planning problems it solves, by the
order in which it decides its answers, or how many wrong codes its samplers mend.

    python scripts/evaluate.py tokenizer --data runs/demo/data --name image --tokenizer '{"plugin": "vq"}'
    python scripts/evaluate.py likelihood --data runs/demo/data --model runs/demo/model
    python scripts/evaluate.py planning --data runs/sudoku4/data --model runs/sudoku4/masked/model
    python scripts/evaluate.py correction --data runs/demo/data --model runs/demo/model --name image

Prints a table, and one line of JSON at the end. STOI and PESQ are included if pystoi and pesq are installed. LPIPS is
included if torchvision's weights of AlexNet, VGG-16 or SqueezeNet 1.1 are in torch's hub folder. Nothing is downloaded.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multidiff import Audio, Codes, Given, ModalityTokenizer, MultiDiffPipeline, evaluation, plugins
from multidiff.checkpoints.parts import load_sampler
from multidiff.data.length import LongDocuments
from multidiff.data.sources.folder import SPLITS, file_states, read_metadata
from multidiff_encodec.mel import MelLoss
from multidiff_sound import SoundTokenizer
from multidiff_sound.sound import to_mono
from multidiff_vq import VQTokenizer
from multidiff_vq.pictures import to_pixels


def tokenizer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a tokenizer, print a table, and return the numbers by description."""
    made = plugins.build({arguments.name: arguments.tokenizer})[arguments.name]
    made.to("cuda" if torch.cuda.is_available() else "cpu")
    values = _values(arguments, arguments.split)[: arguments.num_samples]
    # Largest file first, as when a data folder is tokenized.
    states = file_states(arguments.data, values)
    values.sort(key=lambda value: states.get(str(value), (0, 0))[0], reverse=True)
    items = [made.read(value, arguments.data) for value in tqdm(values, desc="reading", leave=False)]
    if isinstance(made, VQTokenizer):  # crops or pads, so that a restored picture has the size of its original
        items = [made.prepared(item) for item in items]
    codes, encoding = _timed(made.encode, items, arguments.batch, "encoding")
    restored, decoding = _timed(made.decode, codes, arguments.batch, "decoding")
    again, _ = _timed(made.encode, restored, arguments.batch, "encoding again")
    tokens = sum(map(len, codes))
    bare = _bare(made, items, codes, arguments.batch)
    found: dict[str, Any] = {
        "items": len(items),
        "codes an item": tokens / len(items),
        "bits an item": sum(evaluation.information(one, made.codebook_sizes) for one in codes) / len(items),
        "codes a second, encoded": tokens / encoding,
        "codes a second, decoded": tokens / decoding,
        **{
            f"as fast as the bare model, {what}": bare[what] / seconds
            for what, seconds in (("encoded", encoding), ("decoded", decoding))
            if bare
        },
        "codes that come back, decoded and encoded": evaluation.code_agreement(codes, again),
        "saved and loaded, gives the same codes": evaluation.survives_saving(made, items[: arguments.batch]),
    }
    for level, size in enumerate(made.codebook_sizes):
        share_V = evaluation.code_distribution(codes, level, size)
        found[f"level {level}: codes in use, of {size}"] = evaluation.codebook_usage(share_V)
        found[f"level {level}: entropy, nats of {math.log(size):.2f}"] = evaluation.codebook_entropy(share_V)
    found |= _quality(items, restored)
    if arguments.judge:
        found |= _judged(made, arguments, values, items, restored)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    return found


def likelihood(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the bound on the likelihood in every mode, print a table, and return the numbers by mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = MultiDiffPipeline.from_pretrained(arguments.model, device=device)
    estimates, documents = evaluation.measure_folder(
        pipe,
        arguments.data,
        arguments.split,
        draws=arguments.draws,
        max_documents=arguments.num_samples,
        max_eos_padding=arguments.max_eos_padding,
        batch_size=arguments.batch,
        seed=arguments.seed,
        estimator=arguments.estimator,
        max_seq_length=arguments.max_seq_length,
        long_documents=arguments.long_documents,
    )
    print(f"{documents} documents of split {arguments.split!r}\n")
    print(evaluation.bounds_table(estimates, arguments.draws, pipe.transformer.pattern.is_autoregressive))
    found: dict[str, Any] = {"documents": documents, "draws": arguments.draws}
    for one in estimates:
        found[one.mode] = {"nats per token": one.nats, "standard error": one.nats_error}
        if one.unit:
            found[one.mode] |= {f"bits per {one.unit}": one.bits, f"standard error per {one.unit}": one.bits_error}
    return found


def _values(arguments: argparse.Namespace, split: str) -> list[Any]:
    """The values that metadata.jsonl gives for the items of a split, without duplicates."""
    records = read_metadata(arguments.data, (split,))
    values = {json.dumps(value): value for record in records for key, value in record.segments if key == arguments.name}
    if not values:
        raise ValueError(f"{arguments.data}: no document in split {split!r} has a segment {arguments.name!r}")
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
    """Seconds that the neural network alone takes, on prepared tensors in batches of equal shape.

    Empty for tokenizers without a network.
    """
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


def _judged(
    made: ModalityTokenizer, arguments: argparse.Namespace, values: list[Any], items: list[Any], restored: list[Any]
) -> dict[str, float]:
    """The share of items that a classifier recognizes, before and after the tokenizer.

    The classifier is trained on the originals of the training split.
    """
    from demo.judges import ColourJudge, ImageJudge, SpeechJudge

    kinds = {Image.Image: ImageJudge if getattr(items[0], "mode", "") == "L" else ColourJudge, Audio: SpeechJudge}
    judge = next((judge for kind, judge in kinds.items() if isinstance(items[0], kind)), None)
    if judge is None:
        raise ValueError(f"--judge {arguments.judge}: only pictures and sounds have a classifier")
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
            f"{arguments.data}: the segments {arguments.judge!r} in documents with {arguments.name!r} must name two "
            "classes at least"
        )
    labels = [classes.index(class_of[json.dumps(value)]) for value in learned]
    originals = [made.read(value, arguments.data) for value in tqdm(learned, desc="reading", leave=False)]
    fitted = judge.fit(originals, labels, seed=0)
    known = [index for index, value in enumerate(values) if class_of.get(json.dumps(value)) in classes]
    if not known:
        raise ValueError(f"{arguments.data}: no item in split {arguments.split!r} has a class of the training split")
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
    """Metrics of reconstruction, averaged over the items; none for items that only their plugin knows."""
    pairs = list(zip(items, restored, strict=True))
    if isinstance(items[0], str):
        return {
            "texts that come back unchanged": evaluation.text_fidelity(items, restored),
            "characters an item": sum(map(len, items)) / len(items),
        }
    if isinstance(items[0], Image.Image):
        scores = [evaluation.picture_fidelity(one, other) for one, other in tqdm(pairs, desc="comparing", leave=False)]
    elif isinstance(items[0], Audio):
        scores = [_sound(one, other) for one, other in tqdm(pairs, desc="comparing", leave=False)]
    else:
        return {}
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _sound(item: Audio, restored: Audio) -> dict[str, float]:
    original_T, restored_T = evaluation.align_sounds(item, restored)
    distance = float(MelLoss(restored.sample_rate)(restored_T[None], original_T[None]))
    return {
        "mel distance": distance,
        **evaluation.speech_fidelity(original_T, restored_T, restored.sample_rate),
    }


def planning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure how many planning problems a model solves, print a table, and return the numbers by order and givens."""
    from demo.planning.solving import measure
    from multidiff import MultiDiffPipeline

    if min(arguments.num_samples, arguments.batch) < 1:
        raise ValueError("--num-samples and --batch must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = MultiDiffPipeline.from_pretrained(arguments.model, device=device)
    rates = measure(pipeline, arguments.data, arguments.orders, arguments.num_samples, arguments.seed, arguments.batch)
    print(f"{'givens':>8}{'problems':>10}" + "".join(f"{order:>18}" for order in rates))
    for givens in next(iter(rates.values())):
        row = [by_givens[givens] for by_givens in rates.values()]
        print(f"{givens:>8}{row[0].problems:>10}" + "".join(f"{rate!s:>18}" for rate in row))
    return {
        order: {
            givens: {"problems": rate.problems, "solved": rate.rate, "standard_error": rate.standard_error}
            for givens, rate in by_givens.items()
        }
        for order, by_givens in rates.items()
    }


def correction(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure how many wrong codes samplers mend, print a table, and return the numbers by sampler."""
    if min(arguments.num_samples, arguments.batch) < 1:
        raise ValueError("--num-samples and --batch must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe, name = MultiDiffPipeline.from_pretrained(arguments.model, device=device), arguments.name
    pipe.vocabulary.layout(name)
    pipe.set_progress_bar_config(disable=True)
    records = read_metadata(arguments.data, (arguments.split,))
    records = [record for record in records if any(key == name for key, _ in record.segments)][: arguments.num_samples]
    documents = [
        [Given(key, pipe.tokenizers[key].read(value, arguments.data)) for key, value in record.segments]
        for record in tqdm(records, desc="reading", leave=False)
    ]
    found = {}
    print(f"{len(documents)} documents of split {arguments.split!r}\n")
    print(
        "| sampler | wrong codes repaired | wrong codes changed | right codes spoiled | passes |\n|---|---|---|---|---|"
    )
    for text in arguments.samplers:
        pipe.samplers[name] = load_sampler(json.loads(text), pipe.processes.get(name), f"--samplers {text}")
        result = evaluation.measure_correction(
            pipe,
            documents,
            name,
            wrong=arguments.wrong,
            decided=arguments.decided,
            noise=arguments.noise,
            seed=arguments.seed,
            batch_size=arguments.batch,
        )
        print(f"| `{text}` | {result.repaired} | {result.changed} | {result.spoiled} | {result.nfe:.1f} |", flush=True)
        found[text] = dataclasses.asdict(result)
    return found


def main() -> None:
    """Run the evaluation that the command line names, and print its results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("tokenizer", help="Evaluate a tokenizer.")
    one.add_argument(
        "--tokenizer", type=json.loads, required=True, help='Configuration as JSON, e.g. {"plugin": "vq"}.'
    )
    one.add_argument("--name", required=True, help="Key of the tokenizer's items in metadata.jsonl.")
    one.add_argument("--data", type=Path, required=True, help="Data folder.")
    one.add_argument("--split", default="test", help="Split: train, validation or test (default: test).")
    one.add_argument("--num-samples", type=int, default=1000, help="Maximum number of items (default: 1000).")
    one.add_argument("--batch", type=int, default=256, help="Number of items per batch (default: 256).")
    help_ = "Key of the segment that names an item's class. A classifier then measures how well the class is kept."
    one.add_argument("--judge", metavar="KEY", help=help_)
    one.set_defaults(run=tokenizer)
    one = commands.add_parser("planning", help="Evaluate a model on planning problems.")
    one.add_argument("--model", type=Path, required=True, help="Model folder or checkpoint.")
    one.add_argument("--data", type=Path, required=True, help="Data folder that prepare_planning.py wrote.")
    help_ = "Orders of decoding (default: confidence, margin, left_to_right, or row_scan on a grid, and random)."
    one.add_argument("--orders", nargs="+", metavar="ORDER", help=help_)
    one.add_argument("--num-samples", type=int, default=500, help="Maximum number of problems (default: 500).")
    one.add_argument("--batch", type=int, default=100, help="Number of problems per batch (default: 100).")
    one.add_argument("--seed", type=int, default=0, help="Random seed of the order random (default: 0).")
    one.set_defaults(run=planning)
    one = commands.add_parser("likelihood", help="Evaluate the likelihood of documents under a model.")
    one.add_argument("--model", required=True, help="Folder of a saved model, or Lightning checkpoint (.ckpt).")
    one.add_argument("--data", type=Path, required=True, help="Data folder.")
    one.add_argument("--split", default="test", choices=SPLITS, help="Split (default: test).")
    one.add_argument("--draws", type=int, default=4, help="Number of masks drawn for each document (default: 4).")
    one.add_argument("--max-seq-length", type=int, help="That of the training (default: no limit).")
    help_ = "What longer documents do, as in training (default: raise)."
    one.add_argument("--long-documents", choices=get_args(LongDocuments), default="raise", help=help_)
    help_ = "Draw numbers of masks (counts) or times (default: counts where all noise is absorbing)."
    one.add_argument("--estimator", choices=("counts", "times"), help=help_)
    one.add_argument("--num-samples", type=int, default=1000, help="Maximum number of documents (default: 1000).")
    help_ = 'The max_eos_padding of the training, as JSON, e.g. {"text": 1}. It decides the sizes of canvases.'
    one.add_argument("--max-eos-padding", type=json.loads, default={}, help=help_)
    one.add_argument("--batch", type=int, default=64, help="Number of documents per batch (default: 64).")
    one.add_argument("--seed", type=int, default=0, help="Random seed of canvases and masks (default: 0).")
    one.set_defaults(run=likelihood)
    one = commands.add_parser("correction", help="Evaluate how many wrong codes samplers mend.")
    one.add_argument("--model", required=True, help="Folder of a saved model, or Lightning checkpoint (.ckpt).")
    one.add_argument("--data", type=Path, required=True, help="Data folder.")
    one.add_argument("--name", required=True, help="Tokenizer whose codes are made wrong. Other segments are given.")
    one.add_argument("--split", default="test", choices=SPLITS, help="Split (default: test).")
    help_ = "Share of codes that stand as decided; the others are masked (default: 1)."
    one.add_argument("--decided", type=float, default=1.0, help=help_)
    help_ = "Share of wrong codes among those that are decided (default: 0.1)."
    one.add_argument("--wrong", type=float, default=0.1, help=help_)
    help_ = "How much noise samplers presume at least, from 0 to 1 (default: the share of masked codes)."
    one.add_argument("--noise", type=float, help=help_)
    help_ = (
        'Settings of samplers as JSON, one after another (default: {"remask": "edit", "editing_threshold": 0.9}). The '
        "number of steps is one of them."
    )
    default = ['{"remask": "edit", "editing_threshold": 0.9}']
    one.add_argument("--samplers", nargs="+", default=default, metavar="JSON", help=help_)
    one.add_argument("--num-samples", type=int, default=200, help="Maximum number of documents (default: 200).")
    one.add_argument("--batch", type=int, default=64, help="Number of documents per batch (default: 64).")
    one.add_argument("--seed", type=int, default=0, help="Random seed of wrong codes and samples (default: 0).")
    one.set_defaults(run=correction)
    arguments = parser.parse_args()
    try:
        print(json.dumps(arguments.run(arguments)))
    except (ValueError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
