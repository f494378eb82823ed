"""Conditional likelihood against enumeration, and multiple choice with common random numbers."""

import itertools
import math

import pytest
import torch

from multidiff import Blank, Given, Masked
from multidiff.evaluation import Target, log_likelihood, multiple_choice
from multidiff.generation.requests import make_segments
from multidiff.sequence import MASK, SeenDocuments
from tests.helpers.pipelines import make
from tests.helpers.toys import Frames, Grid


@pytest.fixture(scope="module")
def pipe():
    return make({"picture": Grid(3, 1, 2), "note": Frames((4,)), "sound": Frames((3, 2))})


@torch.no_grad()
def bound(pipe, requests, target, absent=()):
    """The bound on log p of the codes at the places `target`, by all masks of every number of codes."""
    batch = pipe.sequencer.batch(make_segments([requests], pipe.sequencer, pipe.tokenizers, lambda name: {}))
    total = 0.0
    for k in range(1, len(target) + 1):
        subsets = list(itertools.combinations(target, k))
        for subset in subsets:
            ids_P = batch.ids_P.clone()
            ids_P[[*subset, *absent]] = MASK
            for place in subset:
                _, _, (start, stop) = pipe.vocabulary.flat_spans[batch.span_P[place]]
                asked = [(torch.tensor([place]), (start, stop))]
                logits_1V = pipe.transformer(ids_P, batch.positions_P3, batch.document_starts, asked, batch.coords_P3)[
                    0
                ]
                nats = -torch.log_softmax(logits_1V[0], -1)[batch.ids_P[place] - start]
                total -= float(nats) / k / len(subsets)  # (1 / L) · (L / k), the mean over k and over masks
    return total


def close(found, exact):
    """Within four standard errors, which are small."""
    assert found.standard_error < 0.2
    assert abs(found.nats - exact) < 4 * found.standard_error
    return True


def codes_of(pipe, name, item):
    return pipe.tokenizers[name].encode([item])[0]


def known(pipe, name, item, *flags, room=0):
    return Masked(name, codes_of(pipe, name, item), torch.tensor(flags, dtype=torch.bool), room)


def test_a_target_given_others_is_measured_as_by_enumeration(pipe):
    """<bos> <note> 1 3 EOS </note> <picture> 2 0 </picture>: the picture's codes stand at 7 and 8."""
    document = [Given("note", [1, 3]), Target("picture", [2, 0])]
    (found,) = log_likelihood(pipe, [document], draws=2, replicates=300)
    assert found.tokens == 2
    assert close(found, bound(pipe, [*document[:1], known(pipe, "picture", [2, 0], 0, 0)], [7, 8]))


def test_a_blank_is_seen_as_masks_and_not_measured(pipe):
    document = [Blank("note", frames=2), Target("picture", [2, 0])]
    (found,) = log_likelihood(pipe, [document], draws=2, replicates=300)
    assert found.tokens == 2
    requests = [Blank("note", frames=2), known(pipe, "picture", [2, 0], 0, 0)]
    assert close(found, bound(pipe, requests, [6, 7], absent=[2, 3]))


def test_unknown_codes_of_a_partly_known_segment_are_measured(pipe):
    document = [known(pipe, "note", [1, 3, 0, 2], 1, 0, 0, 1), Given("picture", [2, 0])]
    (found,) = log_likelihood(pipe, [document], draws=2, replicates=300)
    assert found.tokens == 2
    assert close(found, bound(pipe, document, [3, 4]))


def test_targets_are_measured_together_with_their_ends(pipe):
    """A note and its EOS on a canvas of three, and a picture: five codes, of which the second EOS is padding."""
    document = [Target("note", [3], frames=3), Target("picture", [1, 1])]
    (found,) = log_likelihood(pipe, [document], draws=5, replicates=300)
    assert found.tokens == 4
    requests = [known(pipe, "note", [3], 0, room=2), known(pipe, "picture", [1, 1], 0, 0)]
    assert close(found, bound(pipe, requests, [2, 3, 4, 7, 8]))


def test_all_levels_of_a_frame_are_measured(pipe):
    document = [Target("sound", [2, 1], frames=2)]
    (found,) = log_likelihood(pipe, [document], draws=4, replicates=300)
    assert found.tokens == 3  # two codes and one EOS; the EOS of the second level is not counted
    assert close(found, bound(pipe, [known(pipe, "sound", [2, 1], 0, 0, room=1)], [2, 3, 4, 5]))


def test_a_document_is_measured_the_same_in_any_batch(pipe):
    documents = [
        [Given("note", [1, 3]), Target("picture", [2, 0])],
        [Target("note", [1, 2, 3, 0, 1])],
        [known(pipe, "note", [1, 3, 0], 0, 1, 0), Blank("picture"), Target("sound", [1, 1])],
        [Target("picture", [0, 1]), Target("picture", [1, 0])],
    ]
    together = log_likelihood(pipe, documents, draws=3, groups=range(4))
    for size in (1, 3):
        apart = log_likelihood(pipe, documents, draws=3, groups=range(4), batch_size=size)
        for one, other in zip(together, apart, strict=True):
            assert one.tokens == other.tokens
            assert one.nats == pytest.approx(other.nats, rel=1e-12)
            assert one.standard_error == pytest.approx(other.standard_error, rel=1e-6)
    backwards = log_likelihood(pipe, documents[::-1], draws=3, groups=range(4)[::-1])[::-1]
    assert [one.nats for one in backwards] == pytest.approx([one.nats for one in together], rel=1e-12)
    other = log_likelihood(pipe, documents, draws=3, groups=range(4), seed=1)
    assert all(one.nats != two.nats for one, two in zip(together, other, strict=True))


def test_candidates_have_the_same_masks_on_canvases_of_one_size(pipe, monkeypatch):
    seen = []
    forward = pipe.transformer.forward

    def watched(ids_P, positions_P3, starts, *rest, **named):
        seen.append([part == MASK for part in ids_P.split(starts.diff().tolist())])
        return forward(ids_P, positions_P3, starts, *rest, **named)

    monkeypatch.setattr(pipe.transformer, "forward", watched)
    candidates = [[Given("picture", [0, 1]), Target("note", item)] for item in ([1], [1, 2, 3, 0, 2], [])]
    other = [[Given("picture", [0, 1]), Target("note", [2, 2])]]
    multiple_choice(pipe, [candidates, other], draws=4, replicates=2)
    assert len(seen) == 8
    for one, two, three, last in seen:
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert len(one) == 5 + 2 + 6  # the longest, and its EOS
        assert len(last) == 5 + 2 + 3  # the default canvas
    assert len({tuple(masks[0].tolist()) for masks in seen}) > 2


def test_equal_candidates_differ_by_nothing_and_the_likelier_one_wins(pipe):
    items = list(itertools.product(range(3), repeat=2))
    questions = [
        [[Target("picture", [1, 2])], [Target("picture", [1, 2])]],
        [[Given("note", [0, 1]), Target("picture", list(item))] for item in items],
        [[Target("note", [1])]],
    ]
    same, all_of_them, one = multiple_choice(pipe, questions, draws=2, replicates=200)
    assert (same.margin, same.margin_error) == (0.0, 0.0)
    assert (one.best, one.margin) == (0, math.inf)
    exact = [bound(pipe, [Given("note", [0, 1]), known(pipe, "picture", item, 0, 0)], [7, 8]) for item in items]
    assert sum(map(math.exp, exact)) <= 1
    for found, value in zip(all_of_them.candidates, exact, strict=True):
        assert close(found, value)
    first, second = sorted(range(9), key=lambda place: -exact[place])[:2]
    assert all_of_them.best == first
    assert abs(all_of_them.margin - (exact[first] - exact[second])) < 4 * all_of_them.margin_error
    apart = math.hypot(*(all_of_them.candidates[place].standard_error for place in (first, second)))
    assert all_of_them.margin_error < apart


def test_one_replicate_has_no_standard_error(pipe):
    (found,) = log_likelihood(pipe, [[Target("note", [1])]], replicates=1)
    assert math.isnan(found.standard_error)
    assert log_likelihood(pipe, []) == []
    assert multiple_choice(pipe, []) == []


def test_what_was_not_seen_in_training_is_remarked_on():
    pipe = make({"note": Frames((4,))})
    pipe.seen = SeenDocuments((("note",),), False, {"note": {"frames": (2, 4)}}, {"note": {"frames": 4}})
    assert log_likelihood(pipe, [[Target("note", [1])]], draws=1)[0].tokens == 2
    with pytest.warns(UserWarning, match="canvases of 2 to 4 frames of note, not of 6"):
        log_likelihood(pipe, [[Target("note", [1] * 5)]], draws=1)


def test_modules_keep_their_mode(pipe):
    pipe.transformer.layers[0].train()
    log_likelihood(pipe, [[Target("note", [1])]], draws=1)
    assert pipe.transformer.layers[0].training
    pipe.transformer.eval()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[Given("note", [1])]], {}, r"Document 0 has nothing to measure. Give it a Target."),
        ([[Given("note", [1]), Blank("picture")]], {}, "Document 0 has nothing to measure"),
        ([Target("note", [1])], {}, "document 0 must be a list of segments"),
        ([[Target("nose", [1])]], {}, "no tokenizer is called 'nose'"),
        ([[Target("note", [1, 2], frames=2)]], {}, "has 2 frames and an EOS, which do not fit a canvas of 2 frames"),
        ([[Target("note", [1, 2], tokens=8)]], {}, "tokens is not part of its size"),
        ([[Target("picture", [1, 2], width=4)]], {}, "has the size {'height': 1, 'width': 2}. Leave its size out"),
        ([[Target("note", [1])]], {"draws": 0}, "draws must be at least 1, not 0"),
        ([[Target("note", [1])]], {"groups": [1, 2]}, "2 groups for 1 documents"),
    ],
)
def test_bad_documents(pipe, documents, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(pipe, documents, **options)


def test_a_question_needs_candidates(pipe):
    with pytest.raises(ValueError, match="Question 1 has no candidates"):
        multiple_choice(pipe, [[[Target("note", [1])]], []])


def test_a_target_says_what_it_is():
    assert repr(Target("text", "seven")) == "Target('text', 'seven')"
    assert repr(Target("text", "seven", tokens=4)) == "Target('text', 'seven', tokens=4)"


@pytest.mark.parametrize("pattern", [{"attention": "causal"}, {"attention": "block_causal", "block_length": 2}])
def test_models_in_order_measure_what_follows_what_is_given(pattern):
    """A target behind a given segment, whose codes are no targets but count in the numbers of blocks: the joint
    likelihood is that of the first segment and that of the second given it. Blocks are measured with every number of
    masks, so both sides are exact up to the masks, which differ; causal models have none."""
    pipe = make({"note": Frames((4,)), "picture": Grid(3, 1, 4)}, **pattern)
    picture = [0, 2, 1, 2]
    both = [Target("picture", picture), Target("note", [1, 2, 3])]
    alone, given = [Target("picture", picture)], [Given("picture", picture), Target("note", [1, 2, 3])]
    found = log_likelihood(pipe, [both, alone, given], draws=2, replicates=40)
    error = math.sqrt(sum(one.standard_error**2 for one in found))
    assert (error < 1e-9) == (pattern["attention"] == "causal")
    assert found[0].nats == pytest.approx(found[1].nats + found[2].nats, abs=max(4 * error, 1e-9))
    elsewhere = log_likelihood(pipe, [[Target("note", [1, 2, 3]), Given("picture", picture)]], draws=2, replicates=4)
    other = log_likelihood(pipe, [[Target("note", [1, 2, 3]), Given("picture", [1, 1, 1, 1])]], draws=2, replicates=4)
    assert elsewhere == other  # what stands behind a target does not condition it
