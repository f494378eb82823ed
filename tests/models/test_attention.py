"""Attention within documents, and what queries see of them, against a softmax over all keys under a mask."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multidiff.models import attention
from multidiff.models.attention import Sight, attend, plan_attention
from multidiff.models.sizes import shared_size
from multidiff.sequence.blocks import TokenBlocks
from tests.helpers.largest import Largest
from tests.helpers.toys import generator

CPU = torch.device("cpu")
# Costs under which every size of document is a group of its own, all documents are one group, and the usual ones.
COSTS = {"apart": (0, 10**9), "together": (10**9, 0), "usual": (attention._CALL, attention._TOKEN)}


@pytest.fixture
def costs(monkeypatch):
    def set_to(name):
        for constant, value in zip(("_CALL", "_TOKEN"), COSTS[name], strict=True):
            monkeypatch.setattr(attention, constant, value)
        attention._group.cache_clear()

    yield set_to
    attention._group.cache_clear()


def dense(query_QHE, key_PKE, value_PKE, document_Q, document_P):
    repeats = query_QHE.shape[1] // key_PKE.shape[1]
    head_H = torch.arange(query_QHE.shape[1]) // repeats
    scores_HQP = torch.einsum("qhe,phe->hqp", query_QHE, key_PKE[:, head_H]) / math.sqrt(query_QHE.shape[-1])
    scores_HQP = scores_HQP.masked_fill(document_Q[:, None] != document_P, -math.inf)
    return torch.einsum("hqp,phe->qhe", scores_HQP.softmax(-1), value_PKE[:, head_H])


def tensors(keys, queries, heads=4, kv_heads=2, size=6, dtype=torch.float64, seed=0):
    drawn = generator(seed)
    shapes = [(sum(queries), heads, size), (sum(keys), kv_heads, size), (sum(keys), kv_heads, size)]
    made = [torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    numbers = torch.arange(len(keys))
    return made, numbers.repeat_interleave(torch.tensor(queries)), numbers.repeat_interleave(torch.tensor(keys))


def check(keys, queries, kv_heads=2, seed=0):
    """Forward and gradients agree with the dense ones."""
    made, document_Q, document_P = tensors(keys, queries, kv_heads=kv_heads, seed=seed)
    plan = plan_attention(keys, queries, CPU, torch.float64)
    ours, theirs = attend(*made, plan), dense(*made, document_Q, document_P)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn(ours.shape, generator=generator(seed + 1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), made) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    return plan


sizes = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=9)


@pytest.mark.parametrize("name", COSTS)
def test_attention_is_the_softmax_over_the_keys_of_a_document(costs, name):
    costs(name)

    @settings(max_examples=40, deadline=None, database=None)
    @given(sizes, st.sampled_from([1, 2, 4]), st.integers(0, 99))
    def agrees(documents, kv_heads, seed):
        keys = [count for count, _ in documents]
        queries = [round(count * share) for count, share in documents]  # of some none, of some all
        check(keys, queries, kv_heads, seed)

    agrees()


LAYOUTS = {
    # keys, queries, costs: documents of each group, groups with a mask, whether keys and queries are views
    "equal": ([5] * 4, [5] * 4, "usual", [4], 0, True, True),
    "equal, few queries": ([5] * 4, [2] * 4, "usual", [4], 0, True, True),
    "equal, runs of each size": ([5, 5, 3, 3], [5, 5, 3, 3], "apart", [2, 2], 0, True, True),
    "equal, mixed": ([5, 3, 5, 3], [5, 3, 5, 3], "apart", [2, 2], 0, False, False),
    "unequal": ([5, 3, 4, 4], [5, 3, 4, 4], "together", [4], 1, False, False),
    "unequal queries of equal keys": ([5] * 4, [5, 1, 2, 5], "together", [4], 0, True, False),
    "equal queries of unequal keys": ([5, 3, 4, 6], [2] * 4, "together", [4], 1, False, True),
    "none in the middle": ([5, 5, 5], [5, 0, 5], "together", [2], 0, False, True),
    "none at the ends": ([2, 5, 5, 7], [0, 5, 5, 0], "together", [2], 0, True, True),
    "none but one": ([2, 5, 3], [0, 3, 0], "usual", [1], 0, True, True),
    "padded, none in the middle": ([5, 7, 4, 2], [3, 0, 4, 2], "together", [3], 1, False, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_views_where_they_can_be_and_padded_else(costs, layout):
    keys, queries, name, documents, masked, key_view, query_view = LAYOUTS[layout]
    costs(name)
    plan = check(keys, queries)
    assert plan.documents == documents
    assert sum(mask is not None for mask in plan.masks) == masked
    assert (plan.keys.rows is None, plan.queries.rows is None) == (key_view, query_view)


def test_without_any_query_keys_and_values_stay_in_the_graph():
    made, _, _ = tensors([3, 2], [0, 0])
    answer = attend(*made, plan_attention([3, 2], [0, 0], CPU, torch.float64))
    assert answer.shape == (0, 4, 6)
    assert [gradient.shape for gradient in torch.autograd.grad(answer.sum(), made)] == [part.shape for part in made]


@pytest.mark.parametrize("name", COSTS)
def test_documents_repeated_up_to_a_shared_size_change_nothing(costs, monkeypatch, name):
    costs(name)
    monkeypatch.setattr(attention, "prepares_shapes", lambda device, dtype: True)
    keys = [17, 40, 17, 3, 40, *[19] * 17]
    queries = [17, 21, 0, 3, 40, *[18] * 17]
    plan = check(keys, queries)
    assert all(shared_size(documents) == documents for documents in plan.documents)
    for side in (plan.keys, plan.queries):
        lengths = [rows // documents for rows, documents in zip(side.lengths, plan.documents, strict=True)]
        assert [shared_size(length) for length in lengths] == lengths


@pytest.mark.parametrize("name", COSTS)
def test_rows_behind_the_last_document_change_nothing(costs, name):
    costs(name)
    keys, queries, behind = [5, 5, 3], [5, 2, 0], (4, 6)
    made, document_Q, document_P = tensors(keys, queries)
    drawn = generator(3)
    numbers = zip(made, (behind[1], behind[0], behind[0]), strict=True)
    extra = [torch.randn(n, *x.shape[1:], generator=drawn, dtype=torch.float64) for x, n in numbers]
    plan = plan_attention(keys, queries, CPU, torch.float64, (sum(keys) + behind[0], sum(queries) + behind[1]))
    ours = attend(*(torch.cat(pair) for pair in zip(made, extra, strict=True)), plan)
    theirs = dense(*made, document_Q, document_P)
    assert len(ours) == len(theirs) + behind[1]
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-12)
    sums = [out[: len(theirs)].square().sum() for out in (ours, theirs)]
    for a, b in zip(*(torch.autograd.grad(total, made) for total in sums), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["apart", "together"])
def test_gradients_are_those_of_differences(costs, name):
    costs(name)
    keys, queries = [3, 1, 2], [2, 0, 2]
    made, _, _ = tensors(keys, queries, heads=2, kv_heads=1, size=2)
    plan = plan_attention(keys, queries, CPU, torch.float64)
    assert torch.autograd.gradcheck(lambda *some: attend(*some, plan), made)


@pytest.mark.parametrize("scores", [attention._SCORES, 0])  # by matrix products, and by the fused kernel
@pytest.mark.parametrize("name", ["apart", "together"])
def test_half_precision_is_close(costs, monkeypatch, name, scores):
    costs(name)
    monkeypatch.setattr(attention, "_SCORES", scores)
    keys, queries = [9, 4, 9, 30], [9, 4, 1, 12]
    made, document_Q, document_P = tensors(keys, queries, size=16, dtype=torch.bfloat16)
    ours = attend(*made, plan_attention(keys, queries, CPU, torch.bfloat16))
    exact = [part.detach().double().requires_grad_() for part in made]
    theirs = dense(*exact, document_Q, document_P)
    assert ours.dtype == torch.bfloat16
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.01
    weight = torch.randn(ours.shape, generator=generator(1), dtype=torch.float64)
    gradients = torch.autograd.grad((ours.double() * weight).sum(), made)
    for a, b in zip(gradients, torch.autograd.grad((theirs * weight).sum(), exact), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def test_no_tensor_of_positions_by_positions():
    keys = [20, 21, 22, 23] * 12
    made, _, _ = tensors(keys, keys)
    plan = plan_attention(keys, keys, CPU, torch.float64)
    with Largest() as largest:
        attend(*made, plan).sum().backward()
    assert largest.size <= 4 * len(keys) * 23**2  # heads, documents, queries and keys of each
    assert 4 * len(keys) * 23**2 < 4 * sum(keys) ** 2 / 40


def test_groups_cost_no_more_than_any_division_of_the_sorted_documents():
    """The dynamic program against all divisions, by the same estimate."""
    drawn = generator(5)
    for _ in range(20):
        keys = torch.randint(1, 400, (6,), generator=drawn).tolist()
        queries = [max(1, count // int(torch.randint(1, 4, (), generator=drawn))) for count in keys]

        def cost(groups, keys=keys, queries=queries):
            total = 0
            for group in groups:
                kinds = {(keys[i], queries[i]) for i in group}
                longest, most = max(keys[i] for i in group), max(queries[i] for i in group)
                total += attention._CALL + len(group) * longest * most
                total += attention._TOKEN * len(group) * (longest + most) * (len(kinds) > 1)
            return total

        order = sorted(range(6), key=lambda i: (keys[i], queries[i], i))
        divisions = []
        for cuts in range(2**5):
            edges = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
            divisions.append([order[a:b] for a, b in pairwise(edges)])
        found = attention._group(tuple(zip(keys, queries, strict=True)), attention._CALL)
        assert sorted(i for group in found for i in group) == list(range(6))
        assert cost(found) == min(map(cost, divisions))


# Patterns: queries that do not see their whole document.

patterns = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 255), st.booleans()),
    min_size=1,
    max_size=6,
)


def laid_out(documents, causal):
    """Blocks, and which tokens ask, of documents: steps of block numbers, bits of what asks, whether two copies."""
    number, noisy, keys, place, queries = [], [], [], [], []
    for steps, bits, two in documents:
        numbers = list(accumulate(steps))
        copies = [False] * len(numbers)
        if two and not causal:
            copies += [True] * len(numbers)
            numbers += numbers
        asking = [i for i in range(len(numbers)) if bits >> (i % 8) & 1]
        place += [sum(keys) + i for i in asking]
        queries.append(len(asking))
        number += numbers
        noisy += copies
        keys.append(len(numbers))
    if causal:
        number = list(range(len(number)))
    return TokenBlocks(torch.tensor(number), torch.tensor(noisy)), torch.tensor(place, dtype=torch.int64), keys, queries


def visible(blocks, place_Q, keys):
    """The rule, pair by pair."""
    document = [d for d, count in enumerate(keys) for _ in range(count)]
    number, noisy = blocks.number_P.tolist(), blocks.noisy_P.tolist()
    sees = [
        [
            document[q] == document[k]
            and ((noisy[q] == noisy[k] and number[q] == number[k]) or (not noisy[k] and number[k] < number[q]))
            for k in range(len(number))
        ]
        for q in place_Q.tolist()
    ]
    return torch.tensor(sees, dtype=torch.bool).view(len(place_Q), len(number))


def dense_under(mask_QP, query_QHE, key_PKE, value_PKE):
    head_H = torch.arange(query_QHE.shape[1]) // (query_QHE.shape[1] // key_PKE.shape[1])
    scores_HQP = torch.einsum("qhe,phe->hqp", query_QHE, key_PKE[:, head_H]) / math.sqrt(query_QHE.shape[-1])
    return torch.einsum("hqp,phe->qhe", scores_HQP.masked_fill(~mask_QP, -math.inf).softmax(-1), value_PKE[:, head_H])


def check_pattern(documents, causal, whole, kv_heads=2, seed=0, flex=False):
    if whole:
        documents = [(steps, 255, two) for steps, _, two in documents]
    blocks, place_Q, keys, queries = laid_out(documents, causal)
    made, _, _ = tensors(keys, queries, kv_heads=kv_heads, seed=seed)
    plan = plan_attention(keys, queries, CPU, torch.float64, sight=Sight(blocks, place_Q, causal), flex=flex)
    ours, theirs = attend(*made, plan), dense_under(visible(blocks, place_Q, keys), *made)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn(ours.shape, generator=generator(seed + 1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), made) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    return plan


@pytest.mark.parametrize("name", COSTS)
def test_a_query_sees_its_own_block_and_clean_blocks_before_it(costs, name):
    costs(name)

    @settings(max_examples=60, deadline=None, database=None)
    @given(patterns, st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
    def agrees(documents, causal, whole, kv_heads, seed):
        plan = check_pattern(documents, causal, whole, kv_heads, seed)
        assert plan.causal or not (causal and whole)
        assert not plan.causal or all(mask is None for mask in plan.masks)

    agrees()


def test_keys_that_no_query_sees_are_left_out():
    plan = check_pattern([([0, 0, 1, 0, 1, 0], 0b1100, False)], causal=False, whole=False)
    assert (plan.keys.lengths, plan.queries.lengths, plan.masks) == ([4], [2], [None])
    plan = check_pattern([([0] * 6, 0b100, False), ([0] * 6, 0b10, False)], causal=True, whole=False)
    assert (plan.documents, plan.keys.lengths) == ([2], [2 * 3])  # of 2 and 3 keys, as a group


@pytest.mark.parametrize(("count", "documents"), [(400, [1, 1, 1, 1]), (40, [4])])
def test_scattered_documents_part_where_gathering_costs_more(count, documents):
    """Four documents, each with a query in the middle: the keys that are seen do not follow each other."""
    keys, queries = [count] * 4, [1] * 4
    blocks = TokenBlocks.clean(torch.arange(count).repeat(4))
    place_Q = torch.arange(4) * count + count // 2
    made, _, _ = tensors(keys, queries)
    plan = plan_attention(keys, queries, CPU, torch.float64, sight=Sight(blocks, place_Q, causal=False))
    assert plan.documents == documents
    assert (plan.keys.rows is None) == (len(documents) > 1)
    assert plan.masks == [None] * len(documents)
    theirs = dense_under(visible(blocks, place_Q, keys), *made)
    torch.testing.assert_close(attend(*made, plan), theirs, rtol=0, atol=1e-12)


def test_one_mask_serves_documents_of_the_same_blocks(costs):
    costs("together")
    plan = check_pattern([([0, 0, 1, 0], 255, True)] * 3, causal=False, whole=True)
    assert [mask.shape for mask in plan.masks] == [(1, 1, 8, 8)]
    plan = check_pattern([([0, 0, 1, 0], 255, True), ([0, 1, 0, 0], 255, True)], causal=False, whole=True)
    assert [mask.shape for mask in plan.masks] == [(2, 1, 8, 8)]


@pytest.mark.parametrize("scores", [attention._SCORES, 0])
@pytest.mark.parametrize("causal", [True, False])
def test_patterns_in_half_precision_are_close(costs, monkeypatch, causal, scores):
    costs("together")
    monkeypatch.setattr(attention, "_SCORES", scores)
    documents = [([0] * 5 + [1] * 12, 255, True), ([0, 1] * 10, 255, True), ([1] * 3, 255, True)]
    blocks, place_Q, keys, queries = laid_out(documents, causal)
    made, _, _ = tensors(keys, queries, size=16, dtype=torch.bfloat16)
    plan = plan_attention(keys, queries, CPU, torch.bfloat16, sight=Sight(blocks, place_Q, causal))
    theirs = dense_under(visible(blocks, place_Q, keys), *(part.detach().double() for part in made))
    assert float((attend(*made, plan) - theirs).detach().norm() / theirs.norm()) < 0.01


def flex_plan(documents, causal, device, dtype):
    documents = [(steps * 40, bits | 1, two) for steps, bits, two in documents]  # several tiles
    blocks, place_Q, keys, queries = laid_out(documents, causal)
    sight = Sight(blocks, place_Q, causal=False)
    plan = plan_attention(keys, queries, device, dtype, sight=sight, flex=True)
    assert plan.flex is not None
    assert (plan.masks, plan.starts) == ([], None)
    return plan, sight, keys, queries


@settings(max_examples=30, deadline=None, database=None)
@given(patterns, st.booleans())
def test_tiles_that_hold_a_visible_pair_are_computed(documents, causal):
    plan, (blocks, place_Q, _), keys, _ = flex_plan(documents, causal, CPU, torch.float64)
    sees_QP, tile = visible(blocks, place_Q, keys), attention._TILE
    counts, indices = plan.flex.kv_num_blocks[0, 0].tolist(), plan.flex.kv_indices[0, 0].tolist()
    assert len(counts) == -(-len(place_Q) // tile)
    for row, of_row in enumerate(sees_QP.split(tile)):
        needed = {column for column, part in enumerate(of_row.split(tile, 1)) if bool(part.any())}
        assert needed <= set(indices[row][: counts[row]])
        # Others only where documents or blocks share a tile with some that are visible.
        assert not set(indices[row][: counts[row]]) - needed or len(keys) > 1 or bool(blocks.noisy_P.any())


def check_flex(documents, causal, device, dtype, gradients):
    plan, sight, keys, queries = flex_plan(documents, causal, device, dtype)
    made, _, _ = tensors(keys, queries, size=16, dtype=dtype)
    exact = [part.detach().double().requires_grad_() for part in made]
    theirs = attend(*exact, plan_attention(keys, queries, CPU, torch.float64, sight=sight))
    near = 1e-12 if dtype == torch.float64 else 2e-2
    sent = [part.detach().to(device).requires_grad_(gradients) for part in made]
    ours = attend(*sent, plan)
    assert float((ours.detach().cpu() - theirs.detach()).norm() / theirs.detach().norm()) < near
    if gradients:
        weight = torch.randn(theirs.shape, generator=generator(1), dtype=torch.float64)
        given_back = torch.autograd.grad((ours.cpu().double() * weight).sum(), sent)
        for a, b in zip(given_back, torch.autograd.grad((theirs * weight).sum(), exact), strict=True):
            assert float((a.cpu() - b).norm() / b.norm()) < near


TILED = [([0, 1, 0, 2, 0, 0], 0b1011, True), ([1, 1, 1], 255, True), ([0] * 8, 0b10, False)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_the_mask_of_flex_attention_is_the_same_rule():
    check_flex(TILED, False, CPU, torch.float64, gradients=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_on_a_gpu_is_the_groups_on_a_cpu(causal, dtype):
    check_flex(TILED, causal, torch.device("cuda"), dtype, gradients=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_causal_attention_on_a_gpu_is_the_groups_on_a_cpu():
    blocks, place_Q, keys, queries = laid_out([([1] * 30, 255, False), ([1] * 7, 255, False)], causal=True)
    made, _, _ = tensors(keys, queries, size=16, dtype=torch.bfloat16)
    sight = Sight(blocks, place_Q, causal=True)
    plan = plan_attention(keys, queries, torch.device("cuda"), torch.bfloat16, sight=sight)
    assert plan.starts is not None
    with torch.no_grad():
        ours = attend(*(part.cuda() for part in made), plan).cpu()
        theirs = dense_under(visible(blocks, place_Q, keys), *(part.double() for part in made))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
