"""Metrics of a whole (tiny, untrained) model, the denoising strip, and the page that shows them."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from demo.digits import prepare
from demo.judges import CaptionJudge, ImageJudge
from demo.metrics import DIRECTIONS, Sample, accuracy, bounds, diversity, measure, write_metrics
from demo.page import write_report
from demo.report import Card, Report, Shown, loss_panels, read_scalars
from demo.speech import DIGITS
from demo.strip import OPEN, watch
from multidiff import Audio, Blank, Given, MaskedDiffusionTransformer, MultiDiffPipeline, SharedVocabulary
from tests.helpers.digit_toys import Beeps, Letters, Mosaic

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags that stand open, and everything that the page refers to."""

    def __init__(self, html):
        super().__init__()
        self.open, self.count, self.links = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for key, value in attributes if key in ("src", "href", "data", "srcset", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def pipeline():
    tokenizers = {"text": Letters(), "image": Mosaic(), "speech": Beeps()}
    vocabulary = SharedVocabulary.of(tokenizers)
    transformer = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=32, num_layers=1, num_heads=2)
    transformer.initialize(torch.Generator().manual_seed(0))
    return MultiDiffPipeline(transformer.eval(), vocabulary, tokenizers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("digits") / "data", num_samples=200, progress=False)


@pytest.fixture(scope="module")
def measured(pipeline, folder):
    return measure(pipeline, folder, num=6, opinions=2, steps=2, guidance=2.0, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs of one training: the second resumes before the first has ended."""
    folder = tmp_path_factory.mktemp("logs")
    for run, steps in (("version_0", range(0, 60)), ("version_1", range(40, 500))):
        with SummaryWriter(str(folder / run)) as writer:
            for step in steps:
                writer.add_scalar("train/text", 5.0 - step / 100 + (run == "version_1"), step)
            writer.add_scalar("validation/text/conditional", 1.5, steps[-1])
            writer.add_scalar("validation/joint", 2.5, steps[-1])
            writer.add_scalar("lr-AdamW", 1e-3, steps[-1])
    return folder


def test_metrics_have_a_score_beside_its_ceiling(measured):
    metrics, samples = measured
    seconds = [f"{name}_pocketsphinx" for name in ("text_to_audio", "image_to_audio")]
    for name in [*DIRECTIONS, *seconds]:
        assert set(metrics[name]) == {"score", "real", "reconstruction", "n"}
        assert all(0 <= metrics[name][key] <= 1 for key in ("score", "real", "reconstruction"))
        assert metrics[name]["n"] == (2 if name in seconds else len(samples[name]))
    for name in ("image_to_text", "audio_to_text"):
        assert metrics[name]["real"] == metrics[name]["reconstruction"] == 1
    assert metrics["diversity"]["image"]["n"] == len(samples["text_to_image"])
    assert all(count == 4 for count in metrics["nfe"].values())
    json.dumps(metrics)


def test_samples_are_of_the_test_split_and_do_not_depend_on_the_batch(pipeline, folder, measured):
    _, samples = measured
    assert {type(sample.made) for sample in samples["text_to_image"]} == {Image.Image}
    assert {type(sample.given) for sample in samples["audio_to_text"]} == {Audio}
    test = [line for line in (folder / "metadata.jsonl").read_text().splitlines() if '"split": "test"' in line]
    for some in samples.values():
        for sample in some:
            assert any(json.dumps(sample.source) in line for line in test)
    _, again = measure(pipeline, folder, num=6, opinions=1, steps=2, guidance=2.0, batch_size=100, progress=False)
    assert [s.made for s in again["image_to_text"]] == [s.made for s in samples["image_to_text"]]


def test_accuracy_counts_right_answers():
    samples = [Sample(7, None, made, real, "", 1, None) for made, real in (("a seven", "seven"), ("six", "a seven"))]
    assert accuracy(CaptionJudge(DIGITS), samples, ["seven", "no digit"]) == {
        "score": 0.5,
        "real": 1.0,
        "reconstruction": 0.5,
        "n": 2,
    }


def test_one_memorised_picture_has_no_diversity():
    """Class 1 has a bright bar at some height; a judge learns it, a copied bar does not pass for many."""
    bars = [Image.new("L", (32, 32)) for _ in range(60)]
    for index, bar in enumerate(bars):
        if index % 2:
            bar.paste(255, (4, 2 + index // 4, 28, 8 + index // 4))
    judge = ImageJudge.fit(bars * 6, [index % 2 for index in range(60)] * 6, seed=0, progress=False)
    real = bars[1::2]

    def score(made):
        samples = [Sample(1, None, m, r, str(i), 1, 1) for i, (m, r) in enumerate(zip(made, real, strict=True))]
        return diversity(judge, samples, real)

    assert score(real)["score"] == score(real)["real"] == score(real)["reconstruction"] == 1
    assert score([real[0]] * 30)["score"] == 0
    assert 0 < score([real[0], real[29]] * 15)["score"] < 2
    assert score([bars[0]] * 30)["score"] == 0


def test_bounds_are_nested_by_tokenizer():
    results = {"test/text/conditional": 0.123456, "test/text/unconditional": 1.0, "test/joint": 2.0, "epoch": 3.0}
    assert bounds(results) == {"text": {"conditional": 0.1235, "unconditional": 1.0}, "joint": 2.0}


def test_metrics_are_written_whole(tmp_path):
    write_metrics(tmp_path / "metrics.json", {"parameters": 3})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"parameters": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("name", ["image", "speech"])
def test_strip_uncovers_what_is_decided(pipeline, name):
    strip = watch(pipeline, "a sample", Given("text", "seven"), Blank(name), steps=6, most=4)
    assert [frame.caption.split(":")[0] for frame in strip.frames] == ["step 0", "step 2", "step 4", "step 6"]
    covered = [int((np.asarray(frame.view) == OPEN).all(-1).sum()) for frame in strip.frames]
    assert covered[0] == strip.frames[0].view.width * strip.frames[0].view.height
    assert covered[-1] == 0
    assert covered == sorted(covered, reverse=True)


def test_strip_of_a_text_shows_its_pieces(pipeline):
    strip = watch(pipeline, "a caption", Given("image", Image.new("L", (32, 32))), Blank("text", tokens=5), steps=5)
    assert len(strip.frames) == 6
    assert strip.frames[0].view == [None] * 5
    assert [sum(piece is None for piece in frame.view) for frame in strip.frames[:-1]] == [5, 4, 3, 2, 1]
    assert None not in strip.frames[-1].view


def test_scalars_of_a_resumed_run_are_one_curve(logs):
    scalars = read_scalars(logs)
    steps = [step for step, _ in scalars["train/text"]]
    assert steps == list(range(500))
    assert dict(scalars["train/text"])[50] == pytest.approx(5.5)
    panels = loss_panels(scalars)
    assert list(panels) == ["train", "validation", "validation, conditional"]
    assert panels["validation"]["joint"][-1] == (499, 2.5)


def test_page_is_self_contained(tmp_path, pipeline, measured, logs):
    metrics, samples = measured
    facts = {"bound_nats_per_token": {"text": {"conditional": 1.0}, "joint": 2.0}, "parameters": 1234567}
    path = write_report(
        tmp_path / "new" / "report.html",
        pipeline,
        {**metrics, **facts},
        samples,
        subject="digits",
        names=DIGITS,
        logs=logs,
        commands=["make demo", "multidiff generate --given text='<seven>' && echo done"],
        settings={"seed": 0, "steps": {"image": 8}},
        steps=4,
    )
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert all(link.startswith(("data:", "#s")) for link in page.links)
    assert not any(word in html for word in ("http:", "https:", "//cdn", "<script", "@import", "url("))
    assert page.count["audio"] >= 10
    assert page.count["svg"] == 3
    assert page.count["table"] == 1
    assert "&lt;seven&gt;&#x27; &amp;&amp; echo done" in html
    assert "1,234,567" in html
    assert len(html) < 3_000_000
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_items_of_any_kind_are_shown():
    def preview(item):
        return Image.new("L", (4, 4))

    empty = Shown(Audio(torch.zeros(1, 0), 8000), preview).html()
    assert "<audio" not in empty
    assert "<img" in empty
    assert "<audio" in Shown(Audio(torch.zeros(1, 80), 8000), preview).html()
    assert "&lt;b&gt;" in Shown("<b>", preview).html()
    assert "<img" in Shown([1, 2, 3], preview).html()


def test_empty_curves_and_captions(tmp_path):
    report = Report("a & b", "lead")
    report.curves("curves", "", {"none": {}, "one": {"x": [(0, float("nan"))]}, "flat": {"x": [(3, 1.0)]}})
    report.gallery("cards", "", [Card([Shown("words", lambda item: Image.new("L", (1, 1)))], "made up", right=False)])
    html = report.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("nothing logged") == 2
    assert html.count("<circle") == 1
    assert "✗" in html
    assert "<title>a &amp; b</title>" in html
