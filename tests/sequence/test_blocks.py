"""Blocks of tokens, patterns of attention, and both copies of documents, against rewrites in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.sequence import AttentionPattern, SharedVocabulary
from multidiff.sequence.blocks import side_by_side
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3))}
SEQUENCER = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))
documents = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=4
)  # frames of speech, or a picture where there are four
PATTERNS = [AttentionPattern("block_causal", length) for length in (1, 3, 4, 100, "segment")]


def batch_of(many, padding=0):
    parts = {
        number: SEQUENCER.given("speech", TOKENIZERS["speech"].encode([[1, 2] * number])[0], padding)
        for number in range(4)
    }
    parts[4] = SEQUENCER.given("picture", TOKENIZERS["picture"].encode([[0, 1, 2, 3, 4, 0]])[0])
    return SEQUENCER.batch([[parts[number] for number in document] for document in many])


def numbers_of(document, length):
    """The block of each token of a document, given the numbers of codes of its segments."""
    numbers, first = [0], 0
    for codes in document:
        of_codes = [0 if length == "segment" else place // length for place in range(codes)]
        last = max(of_codes, default=0)
        numbers += [first, *(first + block for block in of_codes), first + last]
        first += last + 1
    return numbers


def codes_of(document):
    return [6 if number == 4 else 2 * number for number in document]


@settings(max_examples=40, deadline=None)
@given(documents, st.sampled_from(PATTERNS))
def test_numbers_go_on_through_a_document(many, pattern):
    expected = [number for one in many for number in numbers_of(codes_of(one), pattern.block_length)]
    assert pattern.numbers(batch_of(many)).tolist() == expected


def test_every_token_is_a_block_of_causal_attention_and_all_are_one_of_full():
    batch = batch_of([[1], [4, 0]])
    assert AttentionPattern("causal").numbers(batch).tolist() == [*range(5), *range(11)]
    assert AttentionPattern().numbers(batch).tolist() == [0] * 16


@settings(max_examples=40, deadline=None)
@given(documents, st.sampled_from(PATTERNS))
def test_a_segment_for_each_block(many, pattern):
    batch = batch_of(many, padding=1)
    parts, source_U = pattern.split(batch)
    number_P = pattern.numbers(batch)
    for name in ("ids_P", "positions_P3", "coords_P3", "span_P", "known_P", "document_starts"):
        assert torch.equal(getattr(parts, name), getattr(batch, name))
    assert torch.equal(parts.segment_P < 0, batch.segment_P < 0)
    found = [[] for _ in source_U]
    for place, (unit, segment) in enumerate(zip(parts.segment_P.tolist(), batch.segment_P.tolist(), strict=True)):
        if unit >= 0:
            found[unit].append(place)
            assert segment == source_U[unit]
    for unit, places in enumerate(found):
        source = int(source_U[unit])
        assert len({int(number_P[place]) for place in places}) <= 1
        assert parts.length_S[unit] == len(places)
        if places:
            assert parts.start_S[unit] == places[0]
            assert places == list(range(places[0], places[-1] + 1))
        assert parts.tokenizer_S[unit] == batch.tokenizer_S[source]
        assert parts.document_S[unit] == batch.document_S[source]
        assert parts.labels[unit] == batch.labels[source]
    divisor_S = torch.zeros_like(batch.divisor_S).index_add(0, source_U, parts.divisor_S)
    assert torch.equal(divisor_S, batch.divisor_S)
    assert bool((parts.divisor_S <= parts.length_S).all())


@settings(max_examples=60, deadline=None)
@given(documents, st.sampled_from(PATTERNS), st.randoms())
def test_both_copies_hold_what_is_of_use(many, pattern, random):
    batch = batch_of(many, padding=1)
    number_P = pattern.numbers(batch)
    target_P = torch.tensor([random.random() < 0.2 for _ in batch.ids_P]) & (batch.segment_P >= 0)
    copies = side_by_side(batch, number_P, target_P)
    edges, starts = batch.document_starts.tolist(), copies.starts.tolist()
    for document in range(batch.num_documents):
        places = range(edges[document], edges[document + 1])
        held = {int(number_P[place]) for place in places if target_P[place]}
        clean = [place for place in places if not held or number_P[place] < max(held)]
        noisy = [place for place in places if int(number_P[place]) in held]
        here = slice(starts[document], starts[document + 1])
        assert copies.index_X[here].tolist() == clean + noisy
        assert copies.blocks.noisy_P[here].tolist() == [False] * len(clean) + [True] * len(noisy)
        assert torch.equal(copies.blocks.number_P[here], number_P[clean + noisy])
        for place in places:
            at = int(copies.noisy_P[place])
            assert (at >= 0) == (place in noisy)
            assert at < 0 or (copies.index_X[at] == place and bool(copies.blocks.noisy_P[at]))


@pytest.mark.parametrize(
    ("attention", "length", "message"),
    [
        ("sparse", None, "attention must be full, causal or block_causal, not 'sparse'"),
        ("block_causal", 0, "needs a block_length of at least 1, or 'segment', not 0"),
        ("block_causal", None, "needs a block_length of at least 1, or 'segment', not None"),
        ("block_causal", True, "not True"),
        ("block_causal", "level", "not 'level'"),
        ("causal", 4, "block_length 4 goes with attention 'block_causal', not 'causal'"),
        ("full", "segment", "block_length 'segment' goes with attention 'block_causal', not 'full'"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(attention, length, message):
    with pytest.raises(ValueError, match=message):
        AttentionPattern(attention, length)
