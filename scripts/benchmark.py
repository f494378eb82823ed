"""Measure decoding: `decoding` its speed on a model without training, `sampling` quality against work on the demo's.

Both print a table and end with one line of JSON. Times are ratios within one run: machines are noisy.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from multidiff import Blank, Given, MaskedDiffusionTransformer, MaskSampler, MultiDiffPipeline
from multidiff.generation.decoding import Decoder, make_runs
from multidiff.seeding import generator_for
from multidiff.sequence.sequencer import Segment, Sequencer, TokenBatch
from multidiff.sequence.vocabulary import MASK, SharedVocabulary, TokenizerLayout


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of this project's loop and of the plain one, at the same number of forward passes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"given": arguments.vocabulary - arguments.span - 8, "target": arguments.span}
    layouts = {name: TokenizerLayout(None, "line", (size,), False, name) for name, size in sizes.items()}
    vocabulary = SharedVocabulary(layouts)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=384, num_layers=6, num_heads=6)
    model.initialize(generator_for(0))
    model.eval().to(device)
    result: dict[str, Any] = {"vocabulary": vocabulary.rows, "span": arguments.span, "device": device}
    print("| target | batch | loop | passes | tokens/s | times as fast |\n|---|---|---|---|---|---|")
    settings: dict[str, Any] = {"unmasking": "linear", "order": "confidence"}
    blocks = {"block_length": arguments.block, "cache": "approximate_dual"}
    cases = [(256, 256, 64, settings, "ours"), (1024, 256, 256, {**settings, **blocks}, "ours, blocks and dual cache")]
    for target, known, steps, options, name in cases:
        for size in arguments.batch:
            batch = _documents(vocabulary, size, known, target)
            _ours(model, vocabulary, batch, MaskSampler(**options), steps, most=2)  # warm up
            seconds = _ours(model, vocabulary, batch, MaskSampler(**options), steps)
            _plain(model, vocabulary, batch.to(device), steps, 1)  # warm up
            plain = _plain(model, vocabulary, batch.to(device), steps, arguments.plain_steps)
            for loop, spent in (("plain", plain), (name, seconds)):
                rate, ratio = size * target / spent, plain / spent
                print(f"| {target} | {size} | {loop} | {steps} | {rate:,.0f} | {ratio:.1f} |", flush=True)
            result[f"{target} tokens, batch {size}"] = round(plain / seconds, 2)
    return result


def _documents(vocabulary: SharedVocabulary, size: int, known: int, target: int) -> TokenBatch:
    """Documents of `known` given codes and `target` ones to fill in."""
    document = []
    for name, length in (("given", known), ("target", target)):
        zero_N, place_N = torch.zeros(length, dtype=torch.int64), torch.arange(length)
        known_N = torch.full((length,), name == "given")
        document.append(
            Segment(name, zero_N, zero_N, place_N[:, None].expand(-1, 3), known_N, length, {"length": length})
        )
    return Sequencer({}, vocabulary).batch([document] * size)


@torch.no_grad()
def _ours(model: Any, vocabulary: Any, batch: Any, sampler: MaskSampler, steps: int, most: int | None = None) -> float:
    inside_S = torch.zeros_like(batch.document_S)
    generators = [generator_for(0, row) for row in range(batch.num_documents)]
    samplers = {"target": sampler, "given": sampler}
    runs = make_runs(batch, inside_S, torch.ones_like(inside_S), vocabulary, samplers, generators, steps)
    decoder = Decoder(model, vocabulary, batch, runs, {}, generators)
    _wait()
    begun = time.perf_counter()
    for step in range(most or decoder.steps):
        decoder.step(step)
    _wait()
    return time.perf_counter() - begun


@torch.no_grad()
def _plain(model: Any, vocabulary: Any, batch: Any, steps: int, measured: int) -> float:
    """The loop that every repository copies (Nie et al. 2025, generate.py): logits of every position over the whole
    vocabulary, Gumbel noise over all of them in fp64, softmax, top-k. All its steps cost the same, so a few are
    measured."""
    ids_BL = torch.where(batch.known_BL, batch.ids_BL, MASK)
    everywhere = torch.arange(ids_BL.numel(), device=ids_BL.device)
    generator = torch.Generator(device=ids_BL.device).manual_seed(0)
    number = int((~batch.known_BL[0]).sum()) // steps
    _wait()
    begun = time.perf_counter()
    for _ in range(measured):
        queries = [(everywhere, (0, vocabulary.rows))]
        (logits_PV,) = model(ids_BL, batch.positions_BL3, batch.document_BL, queries, batch.coords_BL3)
        for row, logits_LV in enumerate(logits_PV.view(*ids_BL.shape, -1)):  # row by row, or it would not fit in memory
            noise_LV = torch.rand(logits_LV.shape, dtype=torch.float64, generator=generator, device=ids_BL.device)
            token_L = logits_LV.double().exp_().div_(noise_LV.log_().neg_()).argmax(-1)
            p_L = torch.softmax(logits_LV, -1).gather(-1, token_L[:, None])[:, 0]
            place_N = p_L.masked_fill(ids_BL[row] != MASK, -torch.inf).topk(number).indices
            ids_BL[row, place_N] = token_L[place_N]
    _wait()
    return (time.perf_counter() - begun) * steps / measured


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


ORDERS = {"text": ("random", "confidence", "margin", "entropy", "left_to_right"),
          "image": ("random", "confidence", "margin", "entropy", "row_scan", "halton"),
          "speech": ("random", "confidence", "margin", "entropy", "left_to_right")}  # fmt: skip
TASKS = {"image_to_text": ("image", "text"), "text_to_image": ("text", "image"), "text_to_audio": ("text", "speech")}
ADAPTIVE = [
    *(
        {"order": "confidence", "unmasking": "threshold", "threshold": value}
        for value in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    ),
    *({"order": "confidence", "unmasking": "factor", "factor": value} for value in (1.0, 2.0, 4.0, 8.0)),
    *(
        {"order": "entropy", "unmasking": "entropy_bound", "entropy_bound": value}
        for value in (1.0, 3.0, 8.0, 12.0, 16.0)
    ),
]


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quality by the demo's judges against forward passes and seconds, for all orders and counts."""
    from demo.corpus import label_of, read_names
    from demo.metrics import fit_judges, pairs_of
    from multidiff.data.folder import read_metadata

    pipe = MultiDiffPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    judges = fit_judges(pipe, arguments.data, seed=arguments.seed)
    _, names = read_names(arguments.data)
    records = read_metadata(arguments.data, splits=("test",))
    rows: list[dict[str, Any]] = []
    plans = [(task, options) for task, (_, made) in TASKS.items() for options in _plans(pipe, made)]
    for task, options in tqdm(plans, desc="sampling", leave=False):
        given, made = TASKS[task]
        pairs = pairs_of(records, given, made)[: arguments.num_samples]
        items = [pipe.tokenizers[given].read(value, arguments.data) for value, _ in pairs]
        labels_N = torch.tensor([label_of(value[1] if given == "text" else value[0], names) for value in pairs])
        saved = pipe.samplers[made]
        kept = {key: saved.settings[key] for key in ("temperature", "canvas", "guidance_scale")}
        pipe.samplers[made] = MaskSampler(**{**kept, **options})
        begun = time.perf_counter()
        output = pipe(
            [[Given(given, item), Blank(made)] for item in items],
            generator=[generator_for(arguments.seed, row) for row in range(len(items))],
        )
        seconds = time.perf_counter() - begun
        pipe.samplers[made] = saved
        judged = judges[made].predict([document[1].item for document in output.documents])
        rows.append(
            {
                "task": task,
                "order": options["order"],
                "unmasking": options["unmasking"],
                "rule": _rule(options),
                "adaptive": "num_inference_steps" not in options,
                "score": float((judged == labels_N).float().mean()),
                "items": len(items),
                "nfe": sum(output.nfe) / len(output.nfe),
                "seconds": seconds / len(items),
            }
        )
    _print_tables(rows)
    _plot(rows, arguments.plot)
    return {task: _ratios([row for row in rows if row["task"] == task]) for task in TASKS}


def _plans(pipe: MultiDiffPipeline, made: str) -> list[dict[str, Any]]:
    number = len(pipe.sequencer.blank(made, pipe.samplers[made].settings["canvas"] or {}))
    steps = sorted({max(1, number // parts) for parts in (8, 4, 2, 1)})
    scheduled = [
        {"order": order, "unmasking": count, "num_inference_steps": number_of}
        for order in ORDERS[made]
        for count in ("linear", "cosine", "arccos")
        for number_of in steps
        if number_of < number or count == "linear"  # with a step for each code all schedules are one
    ]
    return scheduled + ADAPTIVE


def _rule(options: dict[str, Any]) -> str:
    value = options.get("num_inference_steps", options.get(options["unmasking"]))
    return f"{options['count']} {value}"


def _print_tables(rows: list[dict[str, Any]]) -> None:
    """Right answers by order and schedule, in as many forward passes as it says; then what adaptive rules take."""
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task and not row["adaptive"]]
        columns = sorted({(row["nfe"], row["unmasking"]) for row in mine}, key=lambda column: (-column[0], column[1]))
        print(f"\n| {task} | {' | '.join(f'{count}, {nfe:.0f} passes' for nfe, count in columns)} |")
        print("|---" * (1 + len(columns)) + "|")
        for order in dict.fromkeys(row["order"] for row in mine):
            scores = {(row["nfe"], row["unmasking"]): row["score"] for row in mine if row["order"] == order}
            cells = [f"{scores[column]:.3f}" if column in scores else "" for column in columns]
            print(f"| {order} | {' | '.join(cells)} |")
    adaptive = [row for row in rows if row["adaptive"]]
    print(f"\n| rule | {' | '.join(TASKS)} |\n{'|---' * (1 + len(TASKS))}|")
    for rule in dict.fromkeys(row["rule"] for row in adaptive):
        cells = [f"{row['score']:.3f} in {row['nfe']:.1f} passes" for row in adaptive if row["rule"] == rule]
        print(f"| {rule} | {' | '.join(cells)} |")
    print()


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By order: the cheapest adaptive rule that is as good as one code a step in that order, within one standard error
    of the difference, and what it saves."""
    ratios: dict[str, Any] = {}
    for order in ("confidence", "entropy"):
        mine = [row for row in rows if row["order"] == order]
        one = max((row for row in mine if not row["adaptive"]), key=lambda row: row["nfe"])

        def as_good(row: dict[str, Any], one: dict[str, Any] = one) -> bool:
            error = (sum(score * (1 - score) for score in (row["score"], one["score"])) / row["items"]) ** 0.5
            return row["adaptive"] and row["score"] >= one["score"] - error

        ratios[order] = {"one_per_step": round(one["score"], 3)}
        for best in sorted(filter(as_good, mine), key=lambda row: row["nfe"])[:1]:
            ratios[order] |= {
                "rule": best["rule"],
                "score": round(best["score"], 3),
                "passes": round(best["nfe"] / one["nfe"], 3),
                "seconds": round(best["seconds"] / one["seconds"], 3),
            }
    return ratios


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(TASKS), figsize=(4 * len(TASKS), 7), sharey="col", layout="constrained")
    for column, task in enumerate(TASKS):
        mine = [row for row in rows if row["task"] == task]
        for line, (key, label) in enumerate((("nfe", "forward passes"), ("seconds", "seconds each"))):
            axis = axes[line][column]
            for order in dict.fromkeys(row["order"] for row in mine):
                some = [row for row in mine if row["order"] == order and not row["adaptive"]]
                axis.scatter([row[key] for row in some], [row["score"] for row in some], s=14, label=order)
            some = [row for row in mine if row["adaptive"]]
            axis.scatter(
                [row[key] for row in some], [row["score"] for row in some], s=40, marker="*", c="k", label="adaptive"
            )
            axis.set(xlabel=label, title=task.replace("_", " ") if not line else "")
        axes[0][column].legend(fontsize=7)
        axes[0][column].set_ylabel("right name")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="decoding | sampling")
    help_ = "tokens a second against the loop that every repository copies"
    speed = commands.add_parser("decoding", help=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    speed.add_argument("--vocabulary", type=int, default=65_536, help="of all tokenizers together")
    speed.add_argument("--span", type=int, default=8_192, help="of the tokenizer to fill in")
    speed.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="documents at a time")
    speed.add_argument("--block", type=int, default=64, help="block_length of the run with caches")
    speed.add_argument("--plain-steps", type=int, default=3, help="how many steps of the plain loop to time")
    speed.set_defaults(run=decoding)
    help_ = "quality against work for all orders and counts"
    quality = commands.add_parser("sampling", help=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    quality.add_argument("--model", type=Path, default=Path("runs/demo/model"), help="a model of a demo")
    quality.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="its data folder")
    quality.add_argument("--num-samples", type=int, default=200, help="test documents a task")
    quality.add_argument("--seed", type=int, default=0, help="of judges and draws")
    quality.add_argument("--plot", type=Path, default=Path("assets/sampling.png"), help="where the plot goes")
    quality.set_defaults(run=sampling)
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
