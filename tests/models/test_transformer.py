"""The denoiser: documents, positions, spans, and what it computes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from multidiff.models import MaskedDiffusionTransformer, attention
from multidiff.models import transformer as module
from multidiff.models.sizes import shared_size
from multidiff.sequence import MASK, SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.denoisers import PICTURE, SEQUENCER, VOCABULARY, run, segments, transformer
from tests.helpers.largest import Largest
from tests.helpers.toys import Grid, generator


def asked(batch, where_P=None):
    """Every span where it is drawn from, or some of these places."""
    where_P = torch.ones_like(batch.known_P) if where_P is None else where_P
    spans = enumerate(VOCABULARY.flat_spans)
    return [(torch.nonzero(where_P & (batch.span_P == index)).flatten(), span) for index, (_, _, span) in spans]


def logits_and_gradient(model, documents):
    """By document, the logits of each span; and the gradient of their squares, all documents together."""
    batch = SEQUENCER.batch(documents)
    positions = asked(batch)
    logits = run(model, batch, positions)
    model.zero_grad()
    sum(x.square().sum() for x in logits).backward()
    of_documents = [
        [
            logits_NV.detach()[batch.document_P[index_N] == d]
            for logits_NV, (index_N, _) in zip(logits, positions, strict=True)
        ]
        for d in range(len(documents))
    ]
    return of_documents, torch.cat([weight.grad.flatten() for weight in model.parameters()])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=6), st.randoms())
def test_alone_beside_others_and_in_another_order_agree(shapes, random):
    model = transformer(num_key_value_heads=2).double()
    documents = [segments(*shape) for shape in shapes]
    order = random.sample(range(len(shapes)), len(shapes))
    alone = [logits_and_gradient(model, [document]) for document in documents]
    together, gradient = logits_and_gradient(model, documents)
    shuffled, same = logits_and_gradient(model, [documents[place] for place in order])
    for place, ((one,), _) in enumerate(alone):
        for a, b, c in zip(one, together[place], shuffled[order.index(place)], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            torch.testing.assert_close(a, c, rtol=0, atol=1e-12)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(sum(part for _, part in alone), gradient, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(same, gradient, rtol=0, atol=1e-12 * scale)


def test_every_axis_matters_and_only_differences_do():
    model = transformer().double()
    batch = SEQUENCER.batch([segments(3, 1)])

    @torch.no_grad()
    def at(positions_P3):
        logits = model(batch.ids_P, positions_P3, batch.document_starts, asked(batch))
        return torch.cat([x.flatten() for x in logits])

    base = at(batch.positions_P3)
    torch.testing.assert_close(at(batch.positions_P3 + torch.tensor([5, 9, 2])), base, rtol=0, atol=1e-12)
    for axis in range(3):
        moved_P3 = batch.positions_P3.clone()
        moved_P3[4, axis] += 1
        assert float((at(moved_P3) - base).abs().max()) > 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's own
def test_compiled_training_has_the_same_gradients_and_compiles_once(monkeypatch):
    """Traced, differentiated and split, but run as it is: generating code for that takes half a minute."""
    monkeypatch.setattr(attention, "_CALL", 0)  # groups, of which there is another number in every batch
    attention._group.cache_clear()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    batches = [SEQUENCER.batch([segments(frames, 1) for frames in some]) for some in ([2, 2], [1, 2, 3], [5, 0, 5, 2])]
    gradients, counts = [], []
    for compiled in (False, True):
        model = transformer(num_layers=1).train()
        model.enable_gradient_checkpointing()
        if compiled:
            model.compile(backend=counter)
        for batch in batches:
            sum(x.square().sum() for x in run(model, batch, asked(batch))).backward()
            counts.append(counter.frame_count)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    attention._group.cache_clear()
    assert counts[3] > counts[2] == 0
    assert counts[5] <= counts[3] + 2  # where two sizes happened to be equal, their difference is found later
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


def test_coordinate_features_can_be_left_out():
    batch = SEQUENCER.batch([segments(2, 1)])
    arguments = (batch.ids_P, batch.positions_P3, batch.document_starts, [(torch.arange(9), PICTURE)])
    with_them, without = transformer(), transformer(coordinate_features=False)
    (plain,) = without(*arguments)
    assert torch.equal(without(*arguments, batch.coords_P3)[0], plain)
    assert torch.equal(with_them(*arguments)[0], plain)
    assert not torch.allclose(with_them(*arguments, batch.coords_P3)[0], plain)


@pytest.mark.parametrize("tied", [True, False])
def test_head_equals_the_full_head_cut_to_its_span(tied):
    model = transformer(tie_embeddings=tied).double()
    assert (model.head is None) == tied
    batch = SEQUENCER.batch([segments(2, 1), segments(1, 2)])
    positions_N = torch.tensor([1, 5, 9])
    (full,) = run(model, batch, [(positions_N, (0, VOCABULARY.rows))])
    parts = run(model, batch, [(positions_N, span) for _, _, span in VOCABULARY.flat_spans])
    for part, (_, _, (start, stop)) in zip(parts, VOCABULARY.flat_spans, strict=True):
        torch.testing.assert_close(part, full[:, start:stop])
    with pytest.raises(ValueError, match="spans overlap"):
        run(model, batch, [(positions_N, (3, 9)), (positions_N, (5, 7))])


@torch.no_grad()
def test_positions_may_be_asked_for_in_any_order_and_more_than_once():
    model = transformer().double()
    batch = SEQUENCER.batch([segments(2, 1), segments(1, 2)])
    (every,) = run(model, batch, [(torch.arange(len(batch.ids_P)), PICTURE)])
    some_N, others_N = torch.tensor([20, 3, 3, 11, 20]), torch.tensor([3, 0])
    nowhere = torch.empty(0, dtype=torch.int64)
    logits = run(model, batch, [(some_N, PICTURE), (nowhere, (0, 3)), (others_N, PICTURE)])
    torch.testing.assert_close(logits[0], every[some_N], rtol=0, atol=1e-12)
    assert logits[1].shape == (0, 3)
    torch.testing.assert_close(logits[2], every[others_N], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_empty_query_keeps_every_parameter_in_the_graph(layers):
    model = transformer(tie_embeddings=False, num_layers=layers)
    batch = SEQUENCER.batch([segments(1, 1)])
    logits = run(model, batch, asked(batch, torch.zeros_like(batch.known_P)))
    sum(x.sum() for x in logits).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_layer_computes_only_what_is_asked_for(layers):
    model = transformer(num_layers=layers, num_key_value_heads=2).double()
    batch = SEQUENCER.batch([segments(2, 1), segments(0, 3), segments(4, 0)])
    rows = [[] for _ in model.layers]
    for seen, layer in zip(rows, model.layers, strict=True):
        layer.mlp.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
    everything = run(model, batch, [(torch.arange(len(batch.ids_P)), PICTURE)])[0]
    some_N = torch.tensor([4, 7, 8, 50])
    assert batch.document_P[some_N].tolist() == [0, 0, 0, 2]
    (some,) = run(model, batch, [(some_N, PICTURE)])
    torch.testing.assert_close(some, everything[some_N], rtol=0, atol=1e-12)
    assert rows == [[len(batch.ids_P)] * 2] * (layers - 1) + [[len(batch.ids_P), 4]]
    weight = torch.randn(some.shape, generator=generator(), dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (some, everything[some_N])]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, float(b.abs().max())))


def test_gradient_checkpointing_changes_nothing():
    batch = SEQUENCER.batch([segments(2, 1)])
    gradients = []
    for on in (False, True):
        model = transformer().double().train()
        if on:
            model.enable_gradient_checkpointing()
        sum(x.square().sum() for x in run(model, batch, asked(batch))).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_is_close():
    model = transformer(attention_bias=True, qk_norm=False)
    batch = SEQUENCER.batch([segments(3, 1)])
    with torch.no_grad():
        exact = run(model, batch, asked(batch))
        with torch.autocast("cpu", torch.bfloat16):
            rough = run(model, batch, asked(batch))
    for a, b in zip(exact, rough, strict=True):
        assert float((a - b.float()).norm() / a.norm()) < 0.05


@pytest.mark.parametrize("with_targets", [False, True])
def test_rows_up_to_a_shared_size_change_nothing(monkeypatch, with_targets):
    """What half precision takes on a CPU, in double precision."""
    model = transformer().double()
    batch = SEQUENCER.batch([segments(5, 2), segments(2, 3), segments(9, 1)] * 7)
    ids_P, positions, targets = masked(batch)
    assert shared_size(len(ids_P)) > len(ids_P)
    assert any(shared_size(len(index_N)) > len(index_N) for index_N, _ in positions)
    arguments = (ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3)
    results = []
    for shared in (False, True):
        for place in (module, attention):
            monkeypatch.setattr(place, "prepares_shapes", lambda device, dtype, shared=shared: shared)
        made = model(*arguments, targets=targets if with_targets else None)
        total = sum(part.square().sum() for part in made)
        results.append([*made, *torch.autograd.grad(total, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- cross-entropies


def masked(batch):
    """Every third code masked: (ids_P, positions asked for, targets in their order)."""
    where_P = (batch.span_P >= 0) & (torch.arange(len(batch.ids_P)) % 3 == 0)
    positions = asked(batch, where_P)
    targets = torch.cat([batch.ids_P[index_N] - start for index_N, (start, _) in positions])
    return torch.where(where_P, MASK, batch.ids_P), positions, targets


@pytest.mark.parametrize("elements", [None, 1, 12, 40])
def test_cross_entropies_are_those_of_the_logits(monkeypatch, elements):
    model = transformer().double()
    batch = SEQUENCER.batch([segments(5, 2), segments(2, 3)])
    ids_P, positions, targets = masked(batch)
    arguments = (ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3)
    logits = model(*arguments)
    plain = [
        -torch.log_softmax(logits_NV, -1)[torch.arange(len(logits_NV)), target_N]
        for logits_NV, target_N in zip(logits, targets.split([len(x) for x in logits]), strict=True)
    ]
    if elements:
        for limit, value in (("_LOGITS", elements), ("_CHUNK", elements), ("_ROWS", 1)):
            monkeypatch.setattr(module, limit, value)
    nats = model(*arguments, targets=targets)
    weights = torch.rand(len(targets), generator=generator(), dtype=torch.float64)
    gradients = []
    for one in (plain, nats):
        assert [len(part) for part in one] == [len(index_N) for index_N, _ in positions]
        gradients.append(torch.autograd.grad((torch.cat(one) * weights).sum(), list(model.parameters())))
    torch.testing.assert_close(torch.cat(nats), torch.cat(plain), rtol=0, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, float(b.abs().max())))


def test_cross_entropies_of_half_precision_are_in_fp32():
    model = transformer().bfloat16()
    batch = SEQUENCER.batch([segments(5, 2)])
    ids_P, positions, targets = masked(batch)
    with torch.no_grad():
        logits = model(ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3)
        nats = model(ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3, targets=targets)
    split = targets.split([len(x) for x in logits])
    for logits_NV, target_N, nats_N in zip(logits, split, nats, strict=True):
        assert nats_N.dtype == torch.float32
        torch.testing.assert_close(nats_N, F.cross_entropy(logits_NV.float(), target_N, reduction="none"))


def test_a_loss_holds_few_logits_at_once(monkeypatch):
    """No tensor of all positions of the loss by the span, nor of all positions by all positions."""
    grid = {"picture": Grid(3000, 10, 10)}
    vocabulary = SharedVocabulary.of(grid)
    sequencer = Sequencer(grid, vocabulary)
    model = MaskedDiffusionTransformer(vocabulary.rows, hidden_size=16, num_layers=2, num_heads=2)
    model.initialize(generator())
    document = [sequencer.given("picture", grid["picture"].encode([list(range(100))])[0])]
    batch = sequencer.batch([document] * 10)
    index_N = torch.nonzero(batch.span_P >= 0).flatten()
    (span,) = vocabulary.spans["picture"]
    for limit, value in (("_LOGITS", 60_000), ("_CHUNK", 60_000), ("_ROWS", 1)):
        monkeypatch.setattr(module, limit, value)
    with Largest() as largest:
        (nats,) = run(model, batch, [(index_N, span)], targets=batch.ids_P[index_N] - span[0])
        nats.sum().backward()
    scores = 10 * 2 * 103**2  # documents, heads, queries and keys of each
    assert largest.size <= max(60_000, vocabulary.rows * 16, scores)
    assert max(vocabulary.rows * 16, scores) < min(1000 * 3000, len(batch.ids_P) ** 2) / 4


def test_bad_shapes():
    with pytest.raises(ValueError, match="even multiple of num_heads"):
        transformer(num_heads=3)
    with pytest.raises(ValueError, match="multiple of num_key_value_heads 3"):
        transformer(num_key_value_heads=3)
