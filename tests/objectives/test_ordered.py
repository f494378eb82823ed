"""Training examples of models whose attention has an order, against rewrites in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.objectives import Noising, Objective, Task
from multidiff.objectives.times import SMALLEST, draw_time, times_of_blocks
from multidiff.processes import Absorbing, Cosine, Hybrid, LogLinear, Uniform
from multidiff.sequence import MASK, AttentionPattern, Example, SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid

TOKENIZERS = {"a": Grid(2, 1, 8), "b": Grid(2, 1, 8), "v": Frames((3, 3))}
SEQUENCER = Sequencer(TOKENIZERS, SharedVocabulary.of(TOKENIZERS))
VOCABULARY = SEQUENCER.vocabulary
BITS = [0, 1] * 4
CAUSAL, BY_FOUR = AttentionPattern("causal"), AttentionPattern("block_causal", 4)
BY_SEGMENT = AttentionPattern("block_causal", "segment")


def document(*parts, padding=1):
    return [SEQUENCER.given(name, TOKENIZERS[name].encode([item])[0], padding, *label) for name, item, *label in parts]


def examples_of(documents):
    return [Example(one, 0, 3 * number + 1, number) for number, one in enumerate(documents)]


def noising(pattern, task, seed=0, **objective):
    return Noising(SEQUENCER, [Task.of(task)], Objective(**objective), seed, pattern)


LABELS = ["a", "answer", "v", "question"]
PARTS = [("a", BITS), ("a", [1] * 8, "answer"), ("v", [1, 2, 0, 1]), ("v", [2, 2], "question")]
some_roles = st.permutations(["target", "given", "absent", "removed"])


def kept(roles):
    """The segments that are in the sequence, their roles, and the clean batch of them."""
    places = [place for place, role in enumerate(roles) if role != "removed"]
    return [roles[place] for place in places], SEQUENCER.batch([document(*(PARTS[place] for place in places))])


@settings(max_examples=30, deadline=None)
@given(some_roles, st.integers(0, 99))
def test_causal_targets_are_clean_and_read_one_token_before(roles, seed):
    task = {"roles": dict(zip(LABELS, roles, strict=True))}
    made = noising(CAUSAL, task, seed, loss_weights={"v": 3.0})([Example(document(*PARTS), 0, 0, 0)])
    roles, clean = kept(roles)
    names = [roles[number] if number >= 0 else "structure" for number in clean.segment_P.tolist()]
    expected = [MASK if name == "absent" else i for name, i in zip(names, clean.ids_P.tolist(), strict=True)]
    assert made.ids_P.tolist() == expected
    assert torch.equal(made.document_starts, clean.document_starts)
    found = {}
    for (index_N, (start, _)), targets_N, weights_N in zip(
        made.logit_positions(VOCABULARY),
        made.targets_M.split(list(made.sizes)),
        made.loss_weights_M.split(list(made.sizes)),
        strict=True,
    ):
        for place, target, weight in zip(index_N.tolist(), targets_N.tolist(), weights_N.tolist(), strict=True):
            found[place + 1] = (start + target, weight)
    each = {"a": 1.0, "v": 3.0}
    wanted = {}
    for place, name in enumerate(names):
        if name == "target":
            tokenizer = list(TOKENIZERS)[int(clean.tokenizer_S[clean.segment_P[place]])]
            wanted[place] = (int(clean.ids_P[place]), each[tokenizer])
    assert found == wanted
    assert float(made.loss_divisor) == sum(weight for _, weight in wanted.values())
    assert torch.equal(made.bound_weights_M, torch.ones(len(wanted)))
    assert made.blocks is None
    tokens = [0, 0, 0]
    for number, role in enumerate(roles):
        tokens[clean.tokenizer_S[number]] += int(clean.divisor_S[number]) * (role == "target")
    assert made.tokens == tuple(tokens)


@settings(max_examples=40, deadline=None)
@given(some_roles, st.sampled_from([BY_FOUR, BY_SEGMENT]), st.integers(0, 99))
def test_noisy_blocks_stand_behind_clean_predecessors(roles, pattern, seed):
    task = {"roles": dict(zip(LABELS, roles, strict=True))}
    made = noising(pattern, task, seed)([Example(document(*PARTS), 0, 0, 0)])
    roles, clean = kept(roles)
    number_P = pattern.numbers(clean)
    masked = int(made.blocks.noisy_P.sum())
    names = [roles[number] if number >= 0 else "structure" for number in clean.segment_P.tolist()]
    visible = [MASK if name == "absent" else i for name, i in zip(names, clean.ids_P.tolist(), strict=True)]
    noisy, here = made.blocks.noisy_P.tolist(), made.blocks.number_P.tolist()
    assert not masked or noisy == sorted(noisy)
    held = {here[place] for place in made.index_M.tolist()}
    assert all(noisy[place] and int(made.ids_P[place]) == MASK for place in made.index_M.tolist())
    assert {number for number, copy in zip(here, noisy, strict=True) if copy} == held
    if held:
        places = [place for place, number in enumerate(number_P.tolist()) if number < max(held)]
        assert made.ids_P[: len(places)].tolist() == [visible[place] for place in places]
        behind = [place for place, number in enumerate(number_P.tolist()) if number in held]
    else:
        assert made.ids_P.tolist() == visible
        return
    targets = dict(zip(made.index_M.tolist(), made.targets_M.tolist(), strict=True))
    spans = [span for index_N, span in made.logit_positions(VOCABULARY) for _ in index_N]
    start = {place: span[0] for place, span in zip(made.index_M.tolist(), spans, strict=True)}
    for at, place in enumerate(behind, len(places)):
        assert here[at] == int(number_P[place])
        assert torch.equal(made.positions_P3[at], clean.positions_P3[place])
        assert torch.equal(made.coords_P3[at], clean.coords_P3[place])
        if at in targets:
            assert names[place] == "target"
            assert start[at] + targets[at] == int(clean.ids_P[place])
        else:
            assert int(made.ids_P[at]) == visible[place]


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_blocks_have_times_of_their_own_unless_they_are_shared(noise):
    """The weight of the bound is 1/t, which shows t."""
    made = noising(BY_FOUR, {"roles": {"others": "target"}, "noise": noise}, times=(0.2, 0.7))
    documents = [document(("a", BITS), ("b", BITS))] * 50
    examples, seen = examples_of(documents), 0
    batch = made(examples)
    document_M = torch.searchsorted(batch.document_starts.long(), batch.index_M, right=True) - 1
    number_M = batch.blocks.number_P[batch.index_M]
    for number, example in enumerate(examples):
        first = [draw_time(0, 0, example.position, axis, (0.2, 0.7)) for axis in (0, int(noise == "independent"))]
        for block in range(4):
            t = first[block // 2]
            if noise == "independent":
                t = 0.2 + 0.5 * (((t - 0.2) / 0.5 + block % 2 * math.sqrt(23)) % 1)
            weight_M = batch.bound_weights_M[(document_M == number) & (number_M == block)]
            torch.testing.assert_close(weight_M, torch.full_like(weight_M, 1 / t))
            seen += len(weight_M)
    assert seen == len(batch.index_M) > 0


def test_times_of_blocks_are_spread_evenly():
    """Of 64 blocks, every eighth of the range has 8, give or take 2."""
    t_S = torch.tensor([0.3] * 64 + [0.9], dtype=torch.float64)
    times = times_of_blocks(t_S, torch.tensor([0] * 64 + [1]), (SMALLEST, 1.0))
    assert [float(times[0]), float(times[-1])] == pytest.approx([0.3, 0.9])
    assert bool(((times >= SMALLEST) & (times <= 1)).all())
    counts = torch.histc(times[:64], 8, SMALLEST, 1.0)
    assert bool(((counts - 8).abs() <= 2).all())


@pytest.mark.parametrize("pattern", [BY_FOUR, BY_SEGMENT])
def test_independent_times_of_blocks_bound_the_joint(pattern):
    """Two copied segments of 8 equal bits, seen by a model that knows: the joint NLL is log 2, of the first block given
    nothing; clean predecessors tell all others. Within 4 standard errors, which independent documents would have."""
    count, first = 4000, 4 if pattern is BY_FOUR else 8
    documents = [document(("a", [i % 2] * 8), ("b", [i % 2] * 8)) for i in range(count)]
    made = noising(pattern, {"roles": {"others": "target"}}, process=Absorbing(LogLinear(0.0)))(examples_of(documents))
    document_M = torch.searchsorted(made.document_starts.long(), made.index_M, right=True) - 1
    first_M = made.blocks.number_P[made.index_M] == 0
    blind_D = torch.bincount(document_M[first_M], minlength=count) == first
    nats_M = torch.where(blind_D[document_M] & first_M, math.log(2), 0.0)
    nats_D = torch.zeros(count).index_add(0, document_M, nats_M * made.bound_weights_M)
    assert abs(float(nats_D.mean()) - math.log(2)) < 4 * float(nats_D.std()) / math.sqrt(count)


@pytest.mark.parametrize("pattern", [CAUSAL, BY_FOUR])
def test_a_document_is_noised_the_same_in_any_batch(pattern):
    make = noising(pattern, {"roles": {"v": "target"}, "condition_dropout": 0.5})
    examples = examples_of([document(("a", BITS), ("v", [1, 2] * frames)) for frames in (3, 1, 4, 1)])
    together = make(examples)
    whole = [make([example]).ids_P for example in sorted(examples, key=lambda one: len(one.document[1]))]
    assert torch.equal(together.ids_P, torch.cat(whole))


def test_settings_of_noise_are_refused_for_clean_training():
    Objective(weighting="uniform", loss_weights={"a": 2.0}, normalisation="segments").check_pattern(CAUSAL, VOCABULARY)
    for setting in ({"times": (0.1, 1.0)}, {"process": Absorbing(Cosine())}, {"weighting": "clipped"}):
        with pytest.raises(ValueError, match=f"The objective's {next(iter(setting))} has no meaning"):
            Objective(**setting).check_pattern(CAUSAL, VOCABULARY)


def test_blocks_need_noise_that_ends_in_masks():
    Objective(process=Hybrid()).check_pattern(BY_FOUR, VOCABULARY)
    with pytest.raises(
        ValueError, match="A model of block_causal attention with block_length 4 begins with masks, but"
    ):
        Objective(processes={"a": Uniform()}).check_pattern(BY_FOUR, VOCABULARY)


def test_complementary_twins_predict_every_code_of_a_block_once():
    made = noising(BY_FOUR, {"roles": {"b": "target"}}, complementary=True, times=(SMALLEST, 1 - SMALLEST))(
        examples_of([document(("a", BITS), ("b", BITS))] * 20)
    )
    assert made.num_documents == 20
    document_M = torch.searchsorted(made.document_starts.long(), made.index_M, right=True) - 1
    places = made.positions_P3[made.index_M, 2]
    for pair in range(20):
        assert sorted(places[document_M // 2 == pair].tolist()) == list(range(12, 20))


def test_noise_is_that_of_the_copy():
    """0 in the clean copy, the schedule's in the noisy one, and 1 where a segment is absent in either."""
    task = {"roles": {"a": "absent", "v": "given", "b": "target"}}
    made = noising(BY_SEGMENT, task, process=Absorbing(Cosine()))(
        examples_of([document(("a", BITS), ("b", BITS), ("v", [1, 1]))])
    )
    code_P, noisy_P = made.coords_P3[:, 0] >= 0, made.blocks.noisy_P
    assert made.noise_P[~code_P].tolist() == [0.0] * int((~code_P).sum())
    assert made.noise_P[code_P & ~noisy_P].tolist() == [1.0] * 8
    noise = Absorbing(Cosine()).noise(made.t_M[:1].double())
    torch.testing.assert_close(made.noise_P[code_P & noisy_P], noise.float().expand(8))


def test_uniform_noise_goes_by_blocks_too():
    documents = [document(("a", BITS), ("b", BITS))] * 9
    made = noising(BY_FOUR, {"roles": {"b": "target"}}, process=Uniform())(examples_of(documents))
    code_P, noisy_P = made.coords_P3[:, 0] >= 0, made.blocks.noisy_P
    (a, _), (b, _) = VOCABULARY.spans["a"][0], VOCABULARY.spans["b"][0]
    assert made.ids_P[code_P & ~noisy_P].tolist() == [*(a + bit for bit in BITS), *(b + bit for bit in BITS[:4])] * 9
    assert sorted(made.index_M.tolist()) == torch.nonzero(code_P & noisy_P).flatten().tolist()
    assert made.ids_P[made.index_M].tolist() != (made.targets_M + b).tolist()
    assert set(made.ids_P[made.index_M].tolist()) == {b, b + 1}
