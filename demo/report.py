"""One self-contained HTML page of samples, curves and scores. Knows no data set: it shows what it is handed.

Nothing in the page is fetched from anywhere: pictures and sounds are data URIs, curves are SVG, there is no script.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import soundfile
from PIL import Image

from multidiff.tokenizer import Audio

Preview = Callable[[Any], Image.Image]


@dataclass(frozen=True)
class Shown:
    """An item on the page: a text as words, a picture as itself, a sound as a player below its preview, anything else
    as its preview (`ModalityTokenizer.preview`)."""

    item: Any
    preview: Preview

    def html(self) -> str:
        if isinstance(self.item, str):
            return f'<div class="text">{escape(self.item) or "<em>empty</em>"}</div>'
        if isinstance(self.item, Image.Image):
            return f'<div class="picture">{_picture(self.item)}</div>'
        player = f'<audio controls preload="metadata" src="{_wav(self.item)}"></audio>' if _has_sound(self.item) else ""
        kind = "sound" if isinstance(self.item, Audio) else "picture"
        return f'<div class="{kind}">{_picture(self.preview(self.item))}{player}</div>'


@dataclass(frozen=True)
class Card:
    """A few items, one below the other, with a caption.

    Attributes:
        parts: what is shown, in order: for example what was given, and what was made of it.
        caption: below them.
        right: whether a judge agrees; None where none was asked.
    """

    parts: Sequence[Shown]
    caption: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Frame:
    """A moment of sampling.

    Attributes:
        caption: which.
        view: a picture; or the pieces of a text, None where undecided.
    """

    caption: str
    view: Image.Image | Sequence[str | None]


@dataclass(frozen=True)
class Strip:
    """How one sample was filled in: what was given, then frames in order."""

    title: str
    given: Sequence[Shown]
    frames: Sequence[Frame]


class Report:
    """Collects sections in order; `write` makes the page."""

    def __init__(self, title: str, lead: str):
        self.title, self.lead = title, lead
        self._sections: list[tuple[str, str]] = []

    def gallery(self, title: str, note: str, cards: Sequence[Card], *, cell: float = 7) -> None:
        """Cards in a grid; `cell` is the least width of one, in rem."""
        figures = "".join(
            f'<figure class="card"><div class="parts">{"".join(part.html() for part in card.parts)}</div>'
            f"{_caption(card)}</figure>"
            for card in cards
        )
        self._add(title, note, f'<div class="grid" style="--cell:{cell}rem">{figures}</div>')

    def strips(self, title: str, note: str, strips: Sequence[Strip]) -> None:
        """Denoising, frame by frame."""
        self._add(title, note, "".join(_strip(strip) for strip in strips))

    def curves(self, title: str, note: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
        """A plot for each panel, of series of (x, y); x is a training step."""
        plots = "".join(f"<div><h3>{escape(name)}</h3>{_plot(series)}</div>" for name, series in panels.items())
        self._add(title, note, f'<div class="plots">{plots}</div>')

    def scores(self, title: str, note: str, metrics: Mapping[str, Any]) -> None:
        """`metrics.json`: a table of what has a score; smaller tables of what is nested; single values as facts."""
        flat = _flat(metrics)
        rows = "".join(
            f'<tr><td>{_words(name)}</td><td class="score">{value["score"]:.3f}</td><td>{value["real"]:.3f}</td>'
            f"<td>{value['reconstruction']:.3f}</td><td>{value['n']}</td></tr>"
            for name, value in flat.items()
            if isinstance(value, Mapping)
        )
        head = "<th></th><th>generated</th><th>real</th><th>recon&shy;structed</th><th>n</th>"
        table = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        facts = {name: value for name, value in flat.items() if not isinstance(value, Mapping)}
        self._add(title, note, table + _facts(facts))

    def commands(self, title: str, note: str, commands: Sequence[str], settings: Mapping[str, Any]) -> None:
        """The exact commands, and settings by name."""
        self._add(title, note, f"<pre>{escape(chr(10).join(commands))}</pre>{_facts(_flat(settings))}")

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all."""
        template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
        contents = "".join(f'<a href="#s{i}">{escape(title)}</a>' for i, (title, _) in enumerate(self._sections))
        body = "\n".join(f'<section id="s{i}">{html}</section>' for i, (_, html) in enumerate(self._sections))
        page = template.substitute(title=escape(self.title), lead=escape(self.lead), contents=contents, body=body)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
        return path

    def _add(self, title: str, note: str, html: str) -> None:
        self._sections.append((title, f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{html}'))


def read_scalars(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """All scalars that a training logged to TensorBoard below `folder`: tag -> (step, value), later runs winning."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[float, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: sorted(values.items()) for tag, values in found.items()}


def loss_panels(
    scalars: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Scalars by panel and series: "train/text" -> train: text, "validation/text/conditional" -> validation,
    conditional: text."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for tag, points in scalars.items():
        stage, *path = tag.split("/")
        if stage in ("train", "validation") and path:
            panel = ", ".join([stage, *path[1:]])
            panels.setdefault(panel, {})[path[0]] = list(points)
    return dict(sorted(panels.items()))


def _caption(card: Card) -> str:
    if card.right is None:
        return f"<figcaption>{escape(card.caption)}</figcaption>" if card.caption else ""
    mark = '<span class="right">✓</span>' if card.right else '<span class="wrong">✗</span>'
    return f"<figcaption>{mark} {escape(card.caption)}</figcaption>"


def _strip(strip: Strip) -> str:
    frames = []
    for frame in strip.frames:
        if isinstance(frame.view, Image.Image):
            view = _picture(frame.view)
        else:
            pieces = (escape(piece) if piece is not None else '<span class="open"></span>' for piece in frame.view)
            view = f'<div class="pieces">{"".join(pieces)}</div>'
        frames.append(f"<figure>{view}<figcaption>{escape(frame.caption)}</figcaption></figure>")
    words = not isinstance(strip.frames[0].view, Image.Image)
    given = "".join(shown.html() for shown in strip.given)
    return (
        f'<h3>{escape(strip.title)}</h3><div class="given">{given}</div>'
        f'<div class="strip{" words" * words}">{"".join(frames)}</div>'
    )


def _plot(series: Mapping[str, Sequence[tuple[float, float]]], width: int = 420, height: int = 230) -> str:
    """Curves of at most 160 points each, bins averaged."""
    thinned = {name: _thinned([p for p in points if math.isfinite(p[1])], 160) for name, points in series.items()}
    points = [point for some in thinned.values() for point in some]
    if not points:
        return "<p class='note'>nothing logged</p>"
    left, right, top, bottom = 44, width - 8, 8, height - 24
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))

    def across(x: float) -> float:
        return left + (right - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def down(y: float) -> float:
        return bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [
        f'<line class="axis" x1="{left}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        f'<text x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    parts += [f'<text x="{across(x):.1f}" y="{height - 6}" text-anchor="middle">{x:g}</text>' for x in x_ticks[:-1]]
    for index, some in enumerate(thinned.values()):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in some)
        parts.append(f'<polyline class="curve" style="stroke:var(--s{index % 6})" points="{path}"/>')
        if len(some) == 1:
            x, y = some[0]
            parts.append(f'<circle style="fill:var(--s{index % 6})" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>')
    legend = "".join(
        f'<span><i style="background:var(--s{index % 6})"></i>{escape(name)}</span>'
        for index, name in enumerate(thinned)
    )
    return f'<svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg><div class="legend">{legend}</div>'


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    size = -(-len(points) // most)
    bins = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in bins]


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(step * index, 10) for index in range(first, last + 1)]


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined; what has a score stays whole."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping) and "score" not in value:
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[prefix + name] = value
    return flat


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{_words(name)}</dt><dd>{escape(_value(value))}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _has_sound(item: Any) -> bool:
    return isinstance(item, Audio) and item.waveform.numel() > 0


def _picture(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f'<img alt="" width="{image.width}" height="{image.height}" src="{_uri("image/png", file)}">'


def _wav(audio: Audio) -> str:
    file = io.BytesIO()
    samples = audio.waveform.float().clamp(-1, 1).T.cpu().numpy()
    soundfile.write(file, samples, audio.sample_rate, format="WAV", subtype="PCM_16")
    return _uri("audio/wav", file)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
