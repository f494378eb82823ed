"""The count of floating-point operations, beside PyTorch's own counter and beside enumeration."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from multidiff.models import MaskedDiffusionTransformer, forward_flops
from multidiff.models.flops import pairs_seen
from multidiff.sequence import AttentionPattern, TokenBlocks
from tests.helpers.toys import generator

# Documents so unlike in length that each is a group of its own, which nothing pads.
STARTS = torch.tensor([0, 40, 200, 520])
# Some positions twice and in no order; a span that nothing draws from.
POSITIONS = [
    (torch.tensor([7, 510, 41, 7, 130, 300, 301]), (3, 35)),
    (torch.empty(0, dtype=torch.int64), (35, 51)),
    (torch.tensor([519, 41, 0]), (51, 64)),
]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 2, "tie_embeddings": False},
        {"intermediate_size": 80, "time_input": True, "qk_norm": False, "attention_bias": True},
    ],
    ids=["plain", "grouped", "time"],
)
def test_equals_what_the_counter_of_pytorch_sees(layers, sizes):
    model = MaskedDiffusionTransformer(64, hidden_size=32, num_layers=layers, num_heads=4, **sizes)
    model.initialize(generator())
    ids_P = torch.arange(520) % 64
    positions_P3 = torch.arange(520)[:, None].expand(-1, 3)
    noise_P = torch.full((520,), 0.5)
    forward, training = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # attention as matrix products, which the counter knows on a CPU
        with forward:
            model(ids_P, positions_P3, STARTS, POSITIONS, positions_P3, noise_P=noise_P)
        with training:
            parts = model(ids_P, positions_P3, STARTS, POSITIONS, positions_P3, noise_P=noise_P)
            sum(part.square().sum() for part in parts).backward()
    counted = forward_flops(model, STARTS, POSITIONS)
    assert forward.get_total_flops() == counted
    # Features of the time are constants, so their matrix product is differentiated with respect to the weights alone.
    constant = 2 * 520 * 32 * 16 if sizes.get("time_input") else 0
    assert training.get_total_flops() == 3 * counted - constant


def test_needs_only_sizes():
    with torch.device("meta"):
        model = MaskedDiffusionTransformer(64, hidden_size=32, num_layers=2, num_heads=4)
    real = MaskedDiffusionTransformer(64, hidden_size=32, num_layers=2, num_heads=4)
    assert forward_flops(model, STARTS, POSITIONS) == forward_flops(real, STARTS, POSITIONS) > 0


@pytest.mark.parametrize(
    "pattern",
    [AttentionPattern(), AttentionPattern("causal"), AttentionPattern("block_causal", 3)],
    ids=lambda pattern: pattern.attention,
)
def test_pairs_are_those_of_the_rule(pattern):
    starts = torch.tensor([0, 9, 9, 21, 26])  # an empty document among them
    tokens = int(starts[-1])
    random = generator(3)
    number_P = torch.cat([torch.randint(0, 4, (n,), generator=random) for n in starts.diff().tolist()])
    blocks = TokenBlocks(number_P, torch.rand(tokens, generator=random) < 0.4)
    position_Q = torch.randint(0, tokens, (40,), generator=random)
    document_P = torch.repeat_interleave(starts.diff()).tolist()
    count = 0
    for query in position_Q.tolist():
        for key in range(tokens):
            if document_P[query] != document_P[key]:
                continue
            if pattern.is_full:
                count += 1
            elif pattern.is_autoregressive:
                count += key <= query
            else:
                same = number_P[query] == number_P[key] and blocks.noisy_P[query] == blocks.noisy_P[key]
                count += bool(same or (not blocks.noisy_P[key] and number_P[key] < number_P[query]))
    given = blocks if pattern.attention == "block_causal" else None
    assert pairs_seen(pattern, starts, position_Q, given) == count
