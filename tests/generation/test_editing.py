"""Editing: what is kept comes back bit for bit, what is masked is where it was asked for."""

import pytest
import torch
from PIL import Image

from multidiff import Blank, Given
from multidiff.generation.editing import extend, gap, infill, inpaint, outpaint, refine
from tests.helpers.pipelines import make
from tests.helpers.toys import Frames, Grid, generator


@pytest.fixture(scope="module")
def pipe():
    return make({"picture": Grid(5, 2, 3), "speech": Frames((4, 3)), "note": Frames((6,))})


def filled(pipe, part, *others):
    return pipe([[part, *others]], generator=generator(3)).documents[0][0].codes.ids_N.tolist()


def test_infill_keeps_both_ends(pipe):
    for seed in range(5):
        part = infill(pipe, "speech", [3, 0, 1, 2], [2, 1], frames=3)
        assert part.known_N.tolist() == [True] * 4 + [False] * 6 + [True] * 2
        codes = pipe([[part]], generator=generator(seed)).documents[0][0].codes.ids_N.tolist()
        assert len(codes) == 12  # no stop within
        assert codes[:4] + codes[-2:] == [3, 0, 1, 2, 2, 1]


def test_extend_may_end_anywhere_in_its_room(pipe):
    lengths = set()
    for seed in range(30):
        output = pipe([[extend(pipe, "note", [1, 5, 2], max_new_frames=4)]], generator=generator(seed))
        codes = output.documents[0][0].codes.ids_N.tolist()
        assert codes[:3] == [1, 5, 2]
        lengths.add(len(codes))
    assert lengths <= {3, 4, 5, 6, 7}
    assert len(lengths) > 2


def test_gap_is_where_it_was_asked_for(pipe):
    sound = [1, 0, 2, 1, 3, 2, 0, 0]  # 4 frames of 2 levels
    part = gap(pipe, "speech", sound, 0.25, 0.6)
    assert part.known_N.tolist() == [True] * 2 + [False] * 4 + [True] * 2
    codes = filled(pipe, part)
    assert codes[:2] + codes[6:] == sound[:2] + sound[6:]


def test_inpaint_masks_the_cells_that_the_mask_touches():
    pipe = make({"picture": Scaled(5, 2, 3)})
    mask = Image.new("L", (12, 8))
    mask.putpixel((7, 3), 255)  # column 1, row 0
    mask.putpixel((8, 4), 255)  # column 2, row 1
    part = inpaint(pipe, "picture", [0, 1, 2, 3, 4, 0], mask)
    assert part.known_N.tolist() == [True, False, True, True, True, False]
    codes = filled(pipe, part)
    assert [codes[n] for n in (0, 2, 3, 4)] == [0, 2, 3, 4]


def test_outpaint_puts_the_picture_where_it_belongs():
    pipe = make({"picture": Scaled(5, 2, 3)})
    part = outpaint(pipe, "picture", [1, 2, 3, 4, 1, 2], left=4, bottom=8)
    assert part.codes.size == {"height": 16, "width": 16}
    document = pipe([[part]], generator=generator()).documents[0][0]
    grid = document.codes.ids_N.view(4, 4)
    assert grid[:2, 1:].flatten().tolist() == [1, 2, 3, 4, 1, 2]
    assert int((~part.known_N).sum()) == 10


class Scaled(Grid):
    """A grid whose cells are 4 x 4 pixels."""

    def canvas(self, height=None, width=None):
        cells = super().canvas((height or 4 * self.height) // 4, (width or 4 * self.width) // 4)
        return type(cells)(
            cells.ids_N, cells.levels_N, cells.coords_N3, {name: 4 * size for name, size in cells.size.items()}
        )


class Deep(Grid):
    """A grid of two levels."""

    def __init__(self):
        super().__init__()
        self.codebook_sizes = (4, 4)

    def canvas(self, height=None, width=None):
        cells = super().canvas(height, width)
        level_N = torch.arange(2).repeat(len(cells))
        return type(cells)(torch.zeros_like(level_N), level_N, cells.coords_N3.repeat_interleave(2, 0), cells.size)


def test_refine_makes_the_least_sure_codes_anew(pipe):
    first = pipe([[Given("note", [1, 2]), Blank("picture"), Blank("picture")]], generator=generator()).documents[0]
    parts = refine(first, share=0.25)
    assert parts[0].item == [1, 2]
    probs_N = torch.cat([part.probs_N for part in first[1:]])
    known_N = torch.cat([part.known_N for part in parts[1:]])
    assert int((~known_N).sum()) == 3
    assert float(probs_N[~known_N].max()) <= float(probs_N[known_N].min())
    again = pipe([parts], generator=generator(5)).documents[0]
    for part, before, after in zip(parts[1:], first[1:], again[1:], strict=True):
        assert torch.equal(before.codes.ids_N[part.known_N], after.codes.ids_N[part.known_N])
    # What was kept this time has no probability of its own; the rest can be refined again.
    assert int(torch.cat([part.probs_N for part in again[1:]]).isfinite().sum()) == 3
    third = refine(again, share=1.0)
    assert third[0].item == [1, 2]
    for part, before in zip(third[1:], again[1:], strict=True):
        assert torch.equal(part.codes.ids_N, before.codes.ids_N)
        assert torch.equal(part.known_N, before.probs_N.isnan())


def test_bad_requests(pipe):
    mask = Image.new("L", (3, 2))
    document = pipe([[Given("note", [1]), Blank("picture")]], generator=generator()).documents[0]
    cases = [
        (lambda: infill(pipe, "picture", [], [], frames=1), "infill needs items whose length varies"),
        (lambda: infill(pipe, "note", [1], [2], frames=0), "infill needs at least 1 of frames, got 0"),
        (lambda: extend(pipe, "note", [1], max_new_frames=0), "extend needs at least 1 of max_new_frames"),
        (lambda: extend(pipe, "nose", [1], max_new_frames=1), "no tokenizer is called 'nose'"),
        (lambda: gap(pipe, "note", [1, 2], 0.5, 0.5), "gap needs 0 <= start < end <= 1"),
        (lambda: inpaint(pipe, "picture", [0] * 6, mask), "the mask has no bright pixel"),
        (lambda: inpaint(pipe, "picture", [0] * 6, Image.new("L", (4, 2))), "the mask is 4x2 pixels, the picture 3x2"),
        (lambda: inpaint(pipe, "note", [1], mask), "'note' has no height and width"),
        (lambda: outpaint(pipe, "picture", [0] * 6), "nothing to add"),
        (lambda: outpaint(make({"picture": Scaled()}), "picture", [0] * 6, left=3), "left 3 must be a multiple of 4"),
        (lambda: outpaint(make({"picture": Deep()}), "picture", [0] * 12, left=1), "several codes a cell"),
        (lambda: refine(document, 0), "share in"),
        (lambda: refine(document[:1]), "nothing of this document was made"),
    ]
    for request, message in cases:
        with pytest.raises(ValueError, match=message):
            request()
