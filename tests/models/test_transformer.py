"""The denoiser: positions, documents, spans."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from multidiff.models.transformer import (
    KeyValueCache,
    MaskedDiffusionTransformer,
    apply_rotary_emb,
    fourier_features,
    rotary,
    rotary_frequencies,
    wave_turns,
)
from multidiff.objectives.diffusion import queries
from multidiff.sequence.sequencer import Sequencer
from multidiff.sequence.vocabulary import MASK, SharedVocabulary
from tests.helpers.toys import Frames, Grid, generator

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)


def transformer(**options):
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, **options}
    model = MaskedDiffusionTransformer(VOCABULARY.rows, **options)
    model.initialize(generator())
    for weight in model.parameters():  # leave the small initial regime, where everything looks alike
        weight.data.mul_(3)
    return model.eval()


def segments(frames, pictures):
    speech = SEQUENCER.given("speech", TOKENIZERS["speech"].encode([[1, 2] * frames])[0])
    picture = SEQUENCER.given("picture", TOKENIZERS["picture"].encode([[0, 1, 2, 3, 4, 0]])[0])
    return [speech, *[picture] * pictures]


def logits_by_document(model, documents, row_length=None):
    batch = SEQUENCER.batch(documents, row_length)
    asked = queries(batch.span_BL >= 0, batch.span_BL, VOCABULARY)
    logits = model(batch.ids_BL, batch.positions_BL3, batch.document_BL, asked, batch.coords_BL3)
    flat = batch.document_BL.flatten()
    return [
        [logits_NV[flat[index_N] == d] for logits_NV, (index_N, _) in zip(logits, asked, strict=True)]
        for d in range(len(documents))
    ]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=6), st.integers(1, 70))
def test_alone_padded_and_packed_agree(shapes, row_length):
    model = transformer(num_key_value_heads=2).double()
    documents = [segments(*shape) for shape in shapes]
    with torch.no_grad():
        alone = [logits_by_document(model, [document])[0] for document in documents]
        padded = logits_by_document(model, documents)
        packed = logits_by_document(model, documents, row_length)
    for one, two, three in zip(alone, padded, packed, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


def test_equal_axes_are_llamas_rotary():
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, max_position_embeddings=2048)
    positions_BL = torch.randint(0, 2000, (2, 17), generator=generator())
    query_BHLE = torch.randn(2, 4, 17, 24, generator=generator())
    cos, sin = LlamaRotaryEmbedding(config)(query_BHLE, positions_BL)
    theirs, _ = apply_rotary_pos_emb(query_BHLE, query_BHLE, cos, sin)
    positions_BL3 = positions_BL[..., None].expand(-1, -1, 3)
    ours = apply_rotary_emb(
        query_BHLE.transpose(1, 2), *rotary(positions_BL3, rotary_frequencies(24, 10_000.0), torch.float32)
    )
    assert float((ours.transpose(1, 2) - theirs).abs().max()) == 0.0


def test_every_axis_matters_and_only_differences_do():
    model = transformer().double()
    document = segments(3, 1)
    batch = SEQUENCER.batch([document])
    asked = queries(batch.span_BL >= 0, batch.span_BL, VOCABULARY)

    def run(positions_BL3):
        with torch.no_grad():
            return torch.cat([x.flatten() for x in model(batch.ids_BL, positions_BL3, batch.document_BL, asked)])

    base = run(batch.positions_BL3)
    torch.testing.assert_close(run(batch.positions_BL3 + torch.tensor([5, 9, 2])), base, rtol=0, atol=1e-12)
    for axis in range(3):
        moved = batch.positions_BL3.clone()
        moved[0, 4, axis] += 1
        assert float((run(moved) - base).abs().max()) > 1e-6


def test_fourier_features_are_plane_waves():
    coords_N3 = torch.cartesian_prod(torch.arange(9), torch.arange(8), torch.tensor([0, 1, 999]))
    features_ND = fourier_features(coords_N3[None], torch.empty(1, len(coords_N3), 256), wave_turns(128))[0]
    for wave in (1, 2, 57, 128):
        turns_3 = [float(wave**power * Decimal(n).sqrt() % 1) for power, n in ((2, 2), (3, 3), (4, 5))]
        angle_N = 2 * np.pi * coords_N3.numpy() @ np.array(turns_3)
        np.testing.assert_allclose(features_ND[:, wave - 1], np.sqrt(2) * np.cos(angle_N), atol=1e-3)
        np.testing.assert_allclose(features_ND[:, 127 + wave], np.sqrt(2) * np.sin(angle_N), atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):  # what is trained is what is sampled with
        assert torch.equal(
            fourier_features(coords_N3[None], torch.empty(1, len(coords_N3), 256), wave_turns(128))[0], features_ND
        )
    outside_113 = torch.tensor([[[-1, -1, -1]]])
    assert not fourier_features(outside_113, torch.empty(1, 1, 8), wave_turns(4)).any()


def test_wave_vectors_are_exact():
    """Against whole numbers of any size, in units of 2^-64 turns."""
    turns_F3 = wave_turns(5000)
    assert turns_F3.dtype == torch.float64
    for wave in (1, 2, 3, 57, 1448, 1449, 4999, 5000):
        for axis, (power, n) in enumerate(((2, 2), (3, 3), (4, 5))):
            fraction = wave**power * math.isqrt(n << 128) % (1 << 64)
            nearest = fraction - (1 << 64) * (fraction >= 1 << 63)
            assert turns_F3[wave - 1, axis] == nearest / 2**64
            assert abs(float(turns_F3[wave - 1, axis])) <= 0.5


def test_compiled_training_has_the_same_gradients():
    """Traced, differentiated and split, but run as it is: generating code for that takes half a minute."""
    batch = SEQUENCER.batch([segments(2, 1), segments(1, 2)])
    asked = queries(batch.span_BL >= 0, batch.span_BL, VOCABULARY)
    model = transformer(num_layers=1).train()
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    gradients = []
    for network in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits = network(batch.ids_BL, batch.positions_BL3, batch.document_BL, asked, batch.coords_BL3)
        sum(x.square().sum() for x in logits).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


@pytest.mark.parametrize(
    ("axes", "width"),
    [((1, 32, 32), 256), ((500, 2, 1), 256), ((9, 8, 7), 256), ((1, 24, 24), 8192)],
)
def test_fourier_features_tell_places_apart(axes, width):
    coords_N3 = torch.cartesian_prod(*(torch.arange(size) for size in axes))
    features_ND = fourier_features(coords_N3[None], torch.empty(1, len(coords_N3), width), wave_turns(width // 2))[0]
    cosine_NN = features_ND @ features_ND.T / width
    torch.testing.assert_close(cosine_NN.diagonal(), torch.ones(len(coords_N3)), atol=1e-4, rtol=0)
    others_NN = cosine_NN - torch.eye(len(coords_N3))
    assert float(others_NN.abs().max()) < 0.5
    assert float(others_NN.square().mean().sqrt()) < 1.2 / math.sqrt(width)


def test_coordinate_features_can_be_left_out():
    batch = SEQUENCER.batch([segments(2, 1)])
    arguments = (batch.ids_BL, batch.positions_BL3, batch.document_BL, [(torch.arange(9), (9, 14))])
    with_them, without = transformer(), transformer(coordinate_features=False)
    (plain,) = without(*arguments)
    assert torch.equal(without(*arguments, batch.coords_BL3)[0], plain)
    assert torch.equal(with_them(*arguments)[0], plain)
    assert not torch.allclose(with_them(*arguments, batch.coords_BL3)[0], plain)


@pytest.mark.parametrize("tied", [True, False])
def test_head_equals_the_full_head_cut_to_its_span(tied):
    model = transformer(tie_embeddings=tied).double()
    assert (model.head is None) == tied
    batch = SEQUENCER.batch([segments(2, 1), segments(1, 2)])
    positions_N = torch.tensor([1, 5, 9])
    arguments = (batch.ids_BL, batch.positions_BL3, batch.document_BL)
    (full,) = model(*arguments, [(positions_N, (0, VOCABULARY.rows))])
    parts = model(*arguments, [(positions_N, span) for _, _, span in VOCABULARY.flat_spans])
    for part, (_, _, (start, stop)) in zip(parts, VOCABULARY.flat_spans, strict=True):
        torch.testing.assert_close(part, full[:, start:stop])
    with pytest.raises(ValueError, match="spans overlap"):
        model(*arguments, [(positions_N, (3, 9)), (positions_N, (5, 7))])


def test_an_empty_query_keeps_every_parameter_in_the_graph():
    model = transformer(tie_embeddings=False)
    batch = SEQUENCER.batch([segments(1, 1)])
    nowhere = torch.empty(0, dtype=torch.int64)
    logits = model(
        batch.ids_BL, batch.positions_BL3, batch.document_BL, [(nowhere, span) for _, _, span in VOCABULARY.flat_spans]
    )
    sum(x.sum() for x in logits).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    batch = SEQUENCER.batch([segments(2, 1)])
    asked = queries(batch.span_BL >= 0, batch.span_BL, VOCABULARY)
    gradients = []
    for on in (False, True):
        model = transformer().double().train()
        if on:
            model.enable_gradient_checkpointing()
        logits = model(batch.ids_BL, batch.positions_BL3, batch.document_BL, asked)
        sum(x.square().sum() for x in logits).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_is_close():
    model = transformer(attention_bias=True, qk_norm=False)
    with torch.no_grad():
        exact = logits_by_document(model, [segments(3, 1)])[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = logits_by_document(model, [segments(3, 1)])[0]
    for a, b in zip(exact, rough, strict=True):
        assert float((a - b.float()).norm() / a.norm()) < 0.05


def test_bad_shapes():
    with pytest.raises(ValueError, match="even multiple of num_heads"):
        transformer(num_heads=3)
    with pytest.raises(ValueError, match="multiple of num_key_value_heads 3"):
        transformer(num_key_value_heads=3)


@torch.no_grad()
def test_cached_keys_are_those_of_the_pass_that_made_them():
    """Nothing changed since: the logits of a few columns are those of the whole pass. Something did: only its own
    columns know."""
    batch = SEQUENCER.batch([segments(2, 1), segments(3, 4)])
    model = transformer()
    shape, (start, stop) = batch.ids_BL.shape, (9, 14)
    rows = (batch.positions_BL3, batch.document_BL)
    everywhere = [(torch.arange(batch.ids_BL.numel()), (start, stop))]
    cache = KeyValueCache()
    (whole,) = model(batch.ids_BL, *rows, everywhere, batch.coords_BL3, cache)
    active_BA = torch.tensor([[1, 4, 5], [2, 3, 3]])
    asked = [(torch.arange(6), (start, stop))]
    (some,) = model(batch.ids_BL, *rows, asked, batch.coords_BL3, cache, active_BA)
    torch.testing.assert_close(
        some.view(2, 3, -1), whole.view(*shape, -1).gather(1, active_BA[..., None].expand(2, 3, 5))
    )
    changed_BL = batch.ids_BL.clone()
    changed_BL[0, 4] = MASK
    (stale,) = model(changed_BL, *rows, asked, batch.coords_BL3, cache, torch.tensor([[1, 1, 2], [2, 3, 3]]))
    torch.testing.assert_close(stale.view(2, 3, -1)[0, 0], whole.view(*shape, -1)[0, 1])
    (fresh,) = model(changed_BL, *rows, asked, batch.coords_BL3, cache, active_BA)
    assert float((fresh - some).view(2, 3, -1)[0, 0].abs().max()) > 1e-6
    torch.testing.assert_close(fresh.view(2, 3, -1)[1], some.view(2, 3, -1)[1])
    # Rows can be taken out and put back.
    other = KeyValueCache()
    other.update(torch.tensor([1, 0]), cache.select(torch.tensor([1, 0])), 2)
    (again,) = model(changed_BL, *rows, asked, batch.coords_BL3, other, active_BA)
    torch.testing.assert_close(again, fresh)
