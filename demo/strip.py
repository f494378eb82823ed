"""Watches one document being filled in: what is decided after each step, what is still open.

Shape suffixes: N codes of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.report import Frame, Shown, Strip
from multidiff import Blank, Codes, Given, MultiDiffPipeline
from multidiff.seeding import generator_for
from multidiff.sequence import Segment

OPEN = (168, 166, 160)  # the colour of what is undecided
AFTER_END = (255, 255, 255)


def watch(
    pipeline: MultiDiffPipeline,
    title: str,
    given: Given,
    blank: Blank,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    most: int = 8,
) -> Strip:
    """Fill in `blank` beside `given`; at most `most` frames, the open canvas before the first step included.

    In a frame, what is undecided is covered; below the cover it decodes as code 0.
    """
    states: list[Segment] = []

    def remember(pipe: Any, step: int, timestep: int, state: dict[str, Any]) -> None:
        states.append(state["documents"][0][1])

    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        [[given, blank]],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator_for(seed),
        callback_on_step_end=remember,
    )
    first = states[0]
    states.insert(0, _opened(first))
    places = sorted({round(i * (len(states) - 1) / (most - 1)) for i in range(most)})
    frames = [Frame(_moment(place, states[place]), _view(pipeline, states[place])) for place in places]
    return Strip(title, [Shown(given.item, pipeline.tokenizers[given.tokenizer].preview)], frames)


def _opened(segment: Segment) -> Segment:
    return replace(segment, ids_N=segment.ids_N * 0, known_N=segment.known_N & False)


def _moment(step: int, segment: Segment) -> str:
    return f"step {step}: {segment.known_N.float().mean().item():.0%}"


def _view(pipeline: MultiDiffPipeline, segment: Segment) -> Image.Image | Sequence[str | None]:
    tokenizer = pipeline.tokenizers[segment.tokenizer]
    sizes_N = np.array(tokenizer.codebook_sizes)[segment.levels_N.numpy()]
    ids_N, known_N = segment.ids_N.numpy(), segment.known_N.numpy()
    end_N = known_N & (ids_N >= sizes_N)
    shown_N = segment.ids_N.where(segment.known_N, 0)
    shown_N = shown_N.where(torch.from_numpy(~end_N), 0)
    whole = tokenizer.decode([Codes(shown_N, segment.levels_N, segment.coords_N3, segment.size)])[0]
    if isinstance(whole, str):
        return _pieces(tokenizer, segment, end_N)
    picture = tokenizer.preview(whole).convert("RGB")
    coords_N3 = segment.coords_N3.numpy()
    # Pictures lie on axes 1 (row) and 2 (column); what unfolds in time on axis 0.
    in_time = coords_N3[:, 0].max() > 0
    row_N, column_N = (coords_N3[:, 0] * 0, coords_N3[:, 0]) if in_time else (coords_N3[:, 1], coords_N3[:, 2])
    shape = (row_N.max() + 1, column_N.max() + 1)
    codes, decided = np.zeros(shape), np.zeros(shape)
    np.add.at(codes, (row_N, column_N), 1)
    np.add.at(decided, (row_N, column_N), known_N)
    ends = np.flatnonzero(end_N & (segment.levels_N.numpy() == 0))
    if len(ends):
        decided[:, column_N[ends[0]] :] = codes[:, column_N[ends[0]] :]
        picture.paste(
            AFTER_END, (round(picture.width * column_N[ends[0]] / shape[1]), 0, picture.width, picture.height)
        )
    share = Image.fromarray(np.uint8(255 * (1 - decided / codes.clip(1)))).resize(
        picture.size, Image.Resampling.NEAREST
    )
    picture.paste(Image.new("RGB", picture.size, OPEN), mask=share)
    return picture


def _pieces(tokenizer: Any, segment: Segment, end_N: np.ndarray) -> list[str | None]:
    """Every token of a text by itself; None where it is open. Nothing follows the first end."""
    one = tokenizer.canvas(tokens=1)
    pieces: list[str | None] = []
    for place, (known, end) in enumerate(zip(segment.known_N.tolist(), end_N.tolist(), strict=True)):
        if end:
            return [*pieces, "∎"]
        token = Codes(segment.ids_N[place : place + 1], one.levels_N, one.coords_N3, one.size)
        pieces.append(tokenizer.decode([token])[0] if known else None)
    return pieces
