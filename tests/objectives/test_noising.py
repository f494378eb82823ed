"""Training examples: roles, noise, and the weights of the loss, against a rewrite in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.objectives import Noising, Objective, Task
from multidiff.objectives.times import SMALLEST, draw_time
from multidiff.processes import Absorbing, Cosine, CosineSquared, Geometric, LogLinear, Polynomial
from multidiff.sequence import MASK, Example, SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid, generator

TOKENIZERS = {"a": Grid(2, 1, 8), "b": Grid(2, 1, 8), "v": Frames((3, 3))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)
SPANS = [span for _, _, span in VOCABULARY.flat_spans]
BITS = [0, 1] * 4
TENSORS = ("ids_P", "positions_P3", "coords_P3", "document_starts", "index_M", "targets_M", "loss_weights_M")


def document(*parts, padding=1):
    """Of (tokenizer, item), or (tokenizer, item, label)."""
    return [SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0], padding, *label) for name, item, *label in parts]


def examples_of(documents, epoch=0):
    return [Example(one, epoch, 3 * number + 1, number) for number, one in enumerate(documents)]


def noising(*tasks, seed=0, **objective):
    return Noising(SEQUENCER, [Task.of(task) for task in tasks], Objective(**objective), seed)


def same(one, other):
    for name in (*TENSORS, "bound_weights_M", "tokenizer_M", "loss_divisor"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.sizes, one.tokens, one.num_documents) == (other.sizes, other.tokens, other.num_documents)


@settings(max_examples=60, deadline=None)
@given(st.permutations(["target", "given", "absent", "removed"]), st.integers(0, 10**6))
def test_roles_by_label(roles, seed):
    """Four segments of two tokenizers; the labels tell them apart."""
    labels = ["a", "answer", "v", "question"]
    parts = [("a", BITS), ("a", [1] * 8, "answer"), ("v", [1, 2, 0, 1]), ("v", [2, 2], "question")]
    task = {"roles": dict(zip(labels, roles, strict=True))}
    made = noising(task, seed=seed)([Example(document(*parts), 0, 0, 0)])
    kept = [place for place, role in enumerate(roles) if role != "removed"]
    clean = SEQUENCER.batch([document(*(parts[place] for place in kept))])
    # What is removed has never been there: positions, structure and all.
    assert torch.equal(made.positions_P3, clean.positions_P3)
    assert torch.equal(made.coords_P3, clean.coords_P3)
    assert torch.equal(made.document_starts, clean.document_starts)
    masked_P = made.ids_P == MASK
    assert torch.equal(made.ids_P[~masked_P], clean.ids_P[~masked_P])
    assert not masked_P[clean.segment_P < 0].any()
    for segment, place in enumerate(kept):
        inside_P = clean.segment_P == segment
        if roles[place] == "given":
            assert not masked_P[inside_P].any()
        elif roles[place] == "absent":
            assert masked_P[inside_P].all()
        else:
            loss_P = torch.zeros_like(masked_P)
            loss_P[made.index_M] = True
            assert torch.equal(loss_P, masked_P & inside_P)


def test_others_are_what_is_not_named():
    documents = [document(("a", BITS), ("b", BITS), ("v", [0, 0]))]
    given_ = noising({"roles": {"a": "target"}})(examples_of(documents))
    absent = noising({"roles": {"a": "target", "others": "absent"}})(examples_of(documents))
    removed = noising({"roles": {"a": "target", "others": "removed"}})(examples_of(documents))
    assert torch.equal(given_.index_M, absent.index_M)  # the same noise where the roles are the same
    assert torch.equal(given_.targets_M, removed.targets_M)
    assert len(given_.ids_P) == len(absent.ids_P) == 1 + 10 + 10 + 6
    assert len(removed.ids_P) == 1 + 10
    assert int((absent.ids_P == MASK).sum()) == len(absent.index_M) + 8 + 4


def test_conditions_are_dropped_as_often_as_the_task_says():
    """Each given segment on its own. Within 4 standard deviations: it fails by chance once in 16,000 times each."""
    count, share = 1500, 0.3
    documents = [document(("a", BITS), ("b", BITS), ("v", [0, 0]))] * count
    made = noising({"roles": {"v": "target"}, "condition_dropout": share})(examples_of(documents))
    masked_DN = (made.ids_P == MASK).view(count, -1)
    dropped_D2 = torch.stack([masked_DN[:, 2:10], masked_DN[:, 12:20]], 1)
    assert torch.equal(dropped_D2.any(-1), dropped_D2.all(-1))
    dropped_D2 = dropped_D2.all(-1)
    for got, expected in (
        *((dropped, share) for dropped in dropped_D2.unbind(1)),
        (dropped_D2.all(1), share**2),
    ):
        assert abs(float(got.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    assert int(noising({"roles": {"v": "target"}})(examples_of(documents)).ids_P.eq(MASK).sum()) < 6 * count


def test_tasks_are_drawn_for_each_document():
    """Within 4 standard deviations: it fails by chance once in 16,000 times."""
    count = 1000
    tasks = [{"roles": {"b": "target"}, "weight": 3}, {"roles": {"a": "target", "b": "removed"}}]
    made = noising(*tasks)(examples_of([document(("a", BITS), ("b", BITS))] * count))
    removed = int((made.document_starts.diff() == 11).sum())
    assert abs(removed / count - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    with pytest.raises(ValueError, match="No task applies to a document of v"):
        noising(*tasks)(examples_of([document(("v", [0, 0]))]))


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_times_are_shared_or_not(noise):
    """The weight of the bound is 1/t, which shows t."""
    documents = [document(("a", BITS), ("b", BITS), ("a", BITS))] * 200
    task = {"roles": {"a": "target", "b": "given"}, "noise": noise}
    made = noising(task)(examples_of(documents))
    seen = 0
    document_M = torch.searchsorted(made.document_starts.long(), made.index_M, right=True) - 1
    inside_M = made.index_M - made.document_starts.long()[document_M]
    for number, example in enumerate(examples_of(documents)):
        times = [draw_time(0, 0, example.position, axis) for axis in (0, int(noise == "independent"))]
        for place, t in zip((2, 22), times, strict=True):
            here_M = (document_M == number) & (inside_M >= place) & (inside_M < place + 8)
            seen += int(here_M.sum())
            torch.testing.assert_close(made.bound_weights_M[here_M], torch.full((int(here_M.sum()),), 1 / t))
    assert seen == len(made.index_M) > 0


def test_noise_is_that_of_the_document_in_any_batch():
    documents = [document(("a", [i % 2] * 8), ("v", [1, 2] * (i % 5))) for i in range(12)]
    make = noising(
        {"roles": {"others": "target"}, "condition_dropout": 0.5}, {"roles": {"v": "target"}, "condition_dropout": 0.5}
    )
    examples = examples_of(documents, epoch=4)
    alone = [make([example]) for example in examples]
    for some in (examples, examples[::-1], examples[3:8]):
        batch = make(some)
        order = sorted(some, key=lambda example: 1 + sum(len(part) + 2 for part in example.document))
        lengths = batch.document_starts.diff().tolist()
        assert lengths == sorted(lengths)
        parts = [alone[example.number] for example in order]
        assert torch.equal(batch.ids_P, torch.cat([part.ids_P for part in parts]))
        assert torch.equal(batch.positions_P3, torch.cat([part.positions_P3 for part in parts]))
        by_place = torch.argsort(batch.index_M)
        for name in ("targets_M", "loss_weights_M", "bound_weights_M", "tokenizer_M"):
            expected = torch.cat([getattr(part, name)[torch.argsort(part.index_M)] for part in parts])
            assert torch.equal(getattr(batch, name)[by_place], expected), name
        starts = batch.document_starts.tolist()
        places = [start + part.index_M.sort().values for start, part in zip(starts, parts, strict=False)]
        assert torch.equal(batch.index_M[by_place], torch.cat(places))
        assert torch.equal(batch.loss_divisor, sum(part.loss_divisor for part in parts))
        assert batch.tokens == tuple(map(sum, zip(*(part.tokens for part in parts), strict=True)))
    same(make(examples), make(examples))


def test_noise_differs_by_seed_epoch_and_document():
    part, task = document(("a", BITS), ("b", BITS), ("v", [0] * 40)), {"roles": {"others": "target"}}
    base = Example(part, 0, 5, 5)
    ids = [noising(task, seed=seed)([example]).ids_P for seed, example in (
        (0, base), (1, base), (0, base._replace(epoch=1)), (0, base._replace(number=6)), (0, base._replace(position=6)),
    )]  # fmt: skip
    for place, one in enumerate(ids):
        assert not any(torch.equal(one, other) for other in ids[:place])


WEIGHTS = {
    "elbo": lambda w: w,
    "uniform": lambda w: 1.0,
    "clipped": lambda w: min(w, 3.0),
    "softmin": lambda w: 1 / (1 / w + 1 / 3.0),
}


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Geometric()])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("normalisation", ["targets", "masked", "segments", "documents"])
def test_the_loss_is_the_one_written_out(schedule, weighting, normalisation):
    """Sum over masked targets of weight · w(t) · nats, and what it is divided by, token by token. One of the tokenizers
    has a process of its own."""
    task = {"roles": {"v": "target", "answer": "target", "b": "absent", "gone": "removed"}}
    documents = [
        document(
            ("v", [1, 2] * length), ("a", BITS, "answer"), ("a", BITS), ("b", BITS), ("b", BITS, "gone"), padding=3
        )
        for length in (0, 3, 1, 9, 2)
    ]
    weights, schedules, times = {"a": 5.0}, {"v": schedule, "a": Polynomial(2.0)}, (0.2, 0.7)
    make = noising(
        task,
        process=Absorbing(schedule),
        processes={"a": Absorbing(schedules["a"])},
        weighting=weighting,
        weight_limit=3.0 if weighting in ("clipped", "softmin") else None,
        normalisation=normalisation,
        loss_weights=weights,
        times=times,
    )
    examples = examples_of(documents)
    made = make(examples)
    nats_P = torch.rand(len(made.ids_P), generator=generator(), dtype=torch.float64).tolist()
    of_documents = []  # of each, the (weight of a token, whether it counts, its weighted nats) of its segments' tokens
    bound, tokens = dict.fromkeys(TOKENIZERS, 0.0), dict.fromkeys(TOKENIZERS, 0)
    losses = {}
    place = 0
    for example in sorted(examples, key=lambda example: len(example.document[0])):
        place += 1
        targets = 0
        of_documents.append([])
        for segment in example.document[:4]:
            place += 1
            if target := segment.label in ("v", "answer"):
                u = (draw_time(0, 0, example.position, targets) - SMALLEST) / (1 - SMALLEST)
                t = torch.tensor(times[0] + (times[1] - times[0]) * u, dtype=torch.float64)
                targets += 1
                of_tokenizer = schedules[segment.tokenizer]
                w = float(-of_tokenizer.derivative(t) / (1 - of_tokenizer.alpha(t)))
                tokens[segment.tokenizer] += segment.content + (segment.tokenizer == "v")
                of_documents[-1].append([])
            for local, level in zip(segment.ids_N.tolist(), segment.levels_N.tolist(), strict=True):
                masked = int(made.ids_P[place]) == MASK
                if target:
                    nats = masked * WEIGHTS[weighting](w) * nats_P[place]
                    each, counts = weights.get(segment.tokenizer, 1.0), masked or normalisation != "masked"
                    of_documents[-1][-1].append((each, counts, nats))
                    if masked:
                        bound[segment.tokenizer] += w * nats_P[place]
                        losses[place] = (VOCABULARY.spans[segment.tokenizer][level], local)
                place += 1
            place += 1
    assert place == len(made.ids_P)

    def mean(triples):
        return sum(each * nats for each, _, nats in triples) / sum(each for each, counts, _ in triples if counts)

    segments = [segment for some in of_documents for segment in some]
    if normalisation == "segments":
        expected = mean([(segment[0][0], True, mean(segment)) for segment in segments])
    elif normalisation == "documents":
        whole = [[token for segment in some for token in segment] for some in of_documents]
        expected = sum(mean(some) for some in whole) / len(whole)
    else:
        expected = mean([token for segment in segments for token in segment])
    nats_M = torch.tensor(nats_P, dtype=torch.float64)[made.index_M]
    assert float((nats_M * made.loss_weights_M).sum() / made.loss_divisor) == pytest.approx(expected, rel=1e-6)
    assert made.tokens == tuple(tokens.values())
    for name, value in bound.items():
        mine_M = made.tokenizer_M == list(TOKENIZERS).index(name)
        assert float((nats_M * made.bound_weights_M)[mine_M].sum()) == pytest.approx(value, rel=1e-6)
    positions = made.logit_positions(VOCABULARY)
    assert [span for _, span in positions] == SPANS
    found = [(place, span) for index_N, span in positions for place in index_N.tolist()]
    assert {place: (span, local) for (place, span), local in zip(found, made.targets_M.tolist(), strict=True)} == losses
    assert len(found) == len(losses)


EXACT = [LogLinear(0.0), Cosine(0.0), CosineSquared(0.0), Polynomial(2.0, 0.0), Geometric()]


@pytest.mark.parametrize(("schedule", "shared"), [*((schedule, True) for schedule in EXACT), (LogLinear(0.0), False)])
def test_shared_noise_bounds_the_joint_and_independent_noise_does_not(schedule, shared):
    """Two copied segments of n = 8 equal bits, seen by a model that knows: the joint NLL is log 2, whatever the
    schedule. Independent times of the log-linear one give 2 log 2 / (n + 1) = 0.154. Within 4 standard errors, which
    independent documents would have."""
    count = 4000
    task = {"roles": {"others": "target"}, "noise": "shared" if shared else "independent"}
    documents = [document(("a", [i % 2] * 8), ("b", [i % 2] * 8)) for i in range(count)]
    made = noising(task, process=Absorbing(schedule))(examples_of(documents))
    masked_DN = (made.ids_P == MASK).view(count, -1)
    document_M = made.index_M // masked_DN.shape[1]
    blind_D = masked_DN.sum(1) == 16  # half and half where all is masked, else certain
    nats_M = torch.where(blind_D[document_M], math.log(2), 0.0)
    nats_D = torch.zeros(count).index_add(0, document_M, nats_M * made.bound_weights_M)
    expected = math.log(2) if shared else 2 * math.log(2) / 9
    assert abs(float(nats_D.mean()) - expected) < 4 * float(nats_D.std()) / math.sqrt(count)


def test_a_batch_moves_without_what_attention_is_planned_with():
    made = noising({"roles": {"others": "target"}})(examples_of([document(("a", BITS))] * 3))
    away = made.to("meta")
    on_cpu = {
        name for name, value in vars(away).items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    }
    assert on_cpu == {"document_starts", "index_M"}
    assert away.ids_P.shape == made.ids_P.shape
    assert torch.equal(away.index_M, made.index_M)
    same(made.to("cpu"), made)


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine(0.0), CosineSquared(0.0), Polynomial(3.0, 0.0)], ids=str)
def test_complementary_documents_are_noised_where_their_twins_are_not(schedule):
    """Every code of a target has a loss in one of both, and what is absent in none."""
    count = 12
    documents = [document(("a", [i % 2] * 8), ("v", [1, 2, i % 3, 0])) for i in range(count)]
    tasks = [{"roles": {"others": "target"}}, {"roles": {"v": "target"}, "condition_dropout": 0.5}]
    process = Absorbing(schedule)
    examples = examples_of(documents)
    plain = noising(*tasks, process=process)(examples)
    made = noising(*tasks, process=process, complementary=True)(examples)
    assert made.num_documents == plain.num_documents == count
    assert len(made.document_starts) == 2 * count + 1
    loss_P = torch.zeros(len(made.ids_P), dtype=torch.int64)
    loss_P[made.index_M] = 1
    t_P = torch.zeros(len(made.ids_P), dtype=torch.float64)
    t_P[made.index_M] = made.t_M.double()
    lengths = made.document_starts.diff().tolist()
    parts = list(zip(*(x.split(lengths) for x in (made.ids_P, loss_P, t_P)), strict=True))
    plain_ids = plain.ids_P.split(plain.document_starts.diff().tolist())
    opposite = 0
    for number in range(count):
        (first_N, loss_N, t_N), (twin_N, twin_loss_N, twin_t_N) = parts[2 * number : 2 * number + 2]
        assert torch.equal(first_N, plain_ids[number])
        assert torch.equal(first_N[loss_N + twin_loss_N == 0], twin_N[loss_N + twin_loss_N == 0])
        assert not (loss_N & twin_loss_N).any()
        assert (loss_N + twin_loss_N)[-6:-1].all()  # the codes of `v` are targets of both tasks
        times = [x[x > 0].unique() for x in (t_N, twin_t_N)]
        if len(times[0]) == len(times[1]) == 1:
            assert float(process.noise(times[0]) + process.noise(times[1])) == pytest.approx(1, abs=1e-5)
            opposite += 1
    assert opposite > 1


def test_pinned_is_all_that_moves(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
    made = noising({"roles": {"others": "target"}})(examples_of([document(("a", BITS))] * 3))
    same(made.pin_memory(), made)
    assert len(pinned) == 11
    assert not {made.document_starts.data_ptr(), made.index_M.data_ptr()} & set(pinned)
