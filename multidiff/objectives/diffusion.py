"""The forward process and the bound: absorbing-state masked diffusion with a time per segment.

A target segment at time t has each of its tokens replaced by `<mask>` with probability 1 - α(t). The
continuous-time bound on its negative log-likelihood is (Sahoo et al. 2024, arXiv 2406.07524, eq. 10)

    E_t  w(t)  Σ_{i masked} -log p(x_i | x_t),        w(t) = -α'(t) / (1 - α(t))  (1/t for the log-linear schedule).

Exactly as tight and less noisy: mask an exact number k of the L tokens, k uniform in 1..L, with weight L/k
(Ou et al. 2024, arXiv 2406.03736, eq. 3.5; Nie et al. 2025, arXiv 2502.09992, eq. 6). Training uses the first form,
evaluation the second. With a t per segment the sum trains every conditional but bounds nothing joint; with one t
shared by a document's targets it bounds their joint likelihood.

Shape suffixes: B rows, L row length, S segments of the batch, G groups that share a time, N positions asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multidiff.processes.schedules import LogLinear, Schedule
from multidiff.sequence.sequencer import TokenBatch
from multidiff.sequence.vocabulary import MASK, SharedVocabulary, Span

TARGET, GIVEN, ABSENT = 0, 1, 2
ROLES = {"target": TARGET, "given": GIVEN, "absent": ABSENT}

Queries = list[tuple[Tensor, Span]]


@dataclass(frozen=True)
class Task:
    """A row of the task mixture: the roles of a training example's segments.

    Attributes:
        roles: tokenizer name -> "target", "given" or "absent"; "others" stands for every tokenizer not named. A task
            applies to documents that hold every tokenizer it names.
        weight: how often it is drawn, relative to the other tasks that apply.
        condition_dropout: probability that a given segment is made absent, each on its own;
            classifier-free guidance needs some.
        noise: "independent", a t for each target segment, or "shared", one t for all targets of a document.
    """

    roles: dict[str, Literal["target", "given", "absent"]]
    weight: float = 1.0
    condition_dropout: float = 0.0
    noise: Literal["independent", "shared"] = "independent"

    @classmethod
    def of(cls, value: Task | Mapping[str, Any]) -> Task:
        """A task as it is, or from its attributes by name, as a configuration writes them.

        Raises:
            ValueError: an unknown attribute (the message names the nearest), or no roles.
        """
        if isinstance(value, Task):
            return value
        if not isinstance(value, Mapping) or "roles" not in value:
            raise ValueError(f"a task is a table with roles, such as {{'roles': {{'text': 'target'}}}}, not {value!r}")
        known = [attribute.name for attribute in fields(cls)]
        for name in value:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"a task has no attribute {name!r}; {hint}")
        return cls(**value)

    def __post_init__(self) -> None:
        if not isinstance(self.roles, Mapping):
            raise ValueError(f"task roles {self.roles!r} must be a table of tokenizer names and roles")
        if bad := [role for role in self.roles.values() if role not in list(ROLES)]:
            raise ValueError(f"task role {bad[0]!r} is none of {', '.join(ROLES)}")
        if "target" not in self.roles.values():
            raise ValueError(f"task {self.roles} has no target, so it would train nothing")
        numbers = all(isinstance(value, int | float) for value in (self.weight, self.condition_dropout))
        if (
            not numbers
            or not 0 <= self.weight < math.inf
            or not 0 <= self.condition_dropout <= 1
            or self.noise not in ("independent", "shared")
        ):
            raise ValueError(
                f"task {self.roles}: weight ≥ 0, condition_dropout in [0, 1], and noise independent or shared"
            )


@dataclass(frozen=True)
class CorruptedTokens:
    """What `corrupt` did to a batch.

    Attributes:
        ids_BL: shared ids with `<mask>` in place of the noised tokens.
        predicted_BL: bool, masked tokens of target segments: where the loss is.
        target_BL: bool, all tokens of target segments.
        weight_S: weight of each segment's cross-entropy, nats to nats.
    """

    ids_BL: Tensor
    predicted_BL: Tensor
    target_BL: Tensor
    weight_S: Tensor


def draw_roles(
    batch: TokenBatch, tasks: Sequence[Task], vocabulary: SharedVocabulary, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One task for each document.

    Returns:
        role_S: int64, `TARGET`, `GIVEN` or `ABSENT` for each segment.
        group_S: int64, segments with the same number share a time.

    Raises:
        ValueError: no task applies to a document.
    """
    names = list(vocabulary.tokenizers)
    document_S, tokenizer_S = batch.document_S.tolist(), batch.tokenizer_S.tolist()
    draw_D = torch.rand(batch.num_documents, generator=generator, dtype=torch.float64).tolist()
    drop_S = torch.rand(len(document_S), generator=generator, dtype=torch.float64).tolist()
    members: dict[int, list[int]] = {}
    for segment, document in enumerate(document_S):
        members.setdefault(document, []).append(segment)
    role_S, group_S = [GIVEN] * len(document_S), list(range(len(document_S)))
    for document, segments in members.items():
        present = [names[tokenizer_S[segment]] for segment in segments]
        task = _choose(tasks, present, draw_D[document])
        for segment, name in zip(segments, present, strict=True):
            role = ROLES[task.roles.get(name, task.roles.get("others", "given"))]
            if role == GIVEN and drop_S[segment] < task.condition_dropout:
                role = ABSENT
            role_S[segment] = role
            if task.noise == "shared":
                group_S[segment] = segments[0]
    return torch.tensor(role_S), torch.tensor(group_S)


def _choose(tasks: Sequence[Task], present: Sequence[str], draw: float) -> Task:
    names = set(present)
    fitting = [
        task
        for task in tasks
        if task.roles.keys() - {"others"} <= names
        and any(task.roles.get(name, task.roles.get("others", "given")) == "target" for name in names)
    ]
    total = sum(task.weight for task in fitting)
    if not total:
        raise ValueError(f"no task applies to a document of {' + '.join(present)}; add a row to `tasks`")
    draw *= total
    for task in fitting:
        draw -= task.weight
        if draw < 0:
            return task
    return fitting[-1]


def draw_times(role_S: Tensor, group_S: Tensor, generator: torch.Generator, smallest: float = 1e-3) -> Tensor:
    """CorruptedTokens levels t_S in (smallest, 1): one draw per group of targets, from strata permuted over the groups.

    Given segments get 0, absent ones 1.
    """
    groups_G, index_S = torch.unique(group_S[role_S == TARGET], return_inverse=True)
    count = len(groups_G)
    uniform_G = torch.rand(count, generator=generator, dtype=torch.float64)
    order_G = torch.randperm(count, generator=generator)
    level_G = smallest + (1 - smallest) * (order_G + uniform_G) / max(count, 1)
    t_S = (role_S == ABSENT).double()
    t_S[role_S == TARGET] = level_G[index_S]
    return t_S


def corrupt(
    batch: TokenBatch, role_S: Tensor, t_S: Tensor, schedule: Schedule, generator: torch.Generator
) -> CorruptedTokens:
    """The forward process: masks each target token with probability 1 - α(t), each absent one always.

    Structure tokens, given segments and padding stay as they are. `role_S` and `t_S` are CPU tensors, as drawn.
    """
    uniform_BL = torch.rand(batch.ids_BL.shape, generator=generator, dtype=torch.float64)
    masked_S = torch.where(role_S == TARGET, 1 - schedule.alpha(t_S), (role_S == ABSENT).double())
    weight_S = torch.where(role_S == TARGET, schedule.weight(t_S.clamp_min(torch.finfo(torch.float64).tiny)), 0.0)
    device = batch.ids_BL.device
    probability_BL = _per_token(batch, masked_S.to(device), 0.0)
    return _mask(batch, role_S, uniform_BL.to(device) < probability_BL, weight_S)


def corrupt_exactly(batch: TokenBatch, role_S: Tensor, group_S: Tensor, generator: torch.Generator) -> CorruptedTokens:
    """Masks an exact number of the target tokens of each group: k of L with weight L/k, k uniform in 1..L.

    k is drawn from strata permuted over the groups. The expected weighted loss equals that of `corrupt` with the
    log-linear schedule and ε = 0, at less variance.
    """
    device = batch.ids_BL.device
    role_S, group_S = role_S.to(device), group_S.to(device)
    group_BL = _per_token(batch, torch.where(role_S == TARGET, group_S, -1), -1)
    uniform_BL = torch.rand(batch.ids_BL.shape, generator=generator, dtype=torch.float64).to(device)
    flat_P = torch.nonzero(group_BL.flatten() >= 0).flatten()
    groups_G, member_P, size_G = torch.unique(group_BL.flatten()[flat_P], return_inverse=True, return_counts=True)
    count = len(groups_G)
    stratum_G = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    k_G = (stratum_G.to(device) / max(count, 1) * size_G).long().clamp_max(size_G - 1) + 1
    # Rank of every token among those of its group, by its uniform number.
    order_P = torch.argsort(member_P + uniform_BL.flatten()[flat_P])
    first_G = size_G.cumsum(0) - size_G
    rank_P = torch.empty_like(order_P)
    rank_P[order_P] = torch.arange(len(order_P), device=device) - first_G[member_P[order_P]]
    masked_BL = _per_token(batch, role_S == ABSENT, False)
    masked_BL.view(-1)[flat_P] = rank_P < k_G[member_P]
    target_S = (role_S == TARGET) & torch.isin(group_S, groups_G)
    weight_S = torch.zeros(len(role_S), dtype=torch.float64, device=device)
    weight_S[target_S] = (size_G.double() / k_G)[torch.searchsorted(groups_G, group_S[target_S])]
    return _mask(batch, role_S, masked_BL, weight_S)


def _mask(batch: TokenBatch, role_S: Tensor, masked_BL: Tensor, weight_S: Tensor) -> CorruptedTokens:
    device = batch.ids_BL.device
    target_BL = _per_token(batch, (role_S == TARGET).to(device), False)
    ids_BL = torch.where(masked_BL, MASK, batch.ids_BL)
    return CorruptedTokens(ids_BL, masked_BL & target_BL, target_BL, weight_S.float().to(device))


def _per_token(batch: TokenBatch, value_S: Tensor, elsewhere: float) -> Tensor:
    """A value per segment spread over its tokens; `elsewhere` at structure and padding."""
    return torch.where(batch.segment_BL < 0, elsewhere, value_S[batch.segment_BL.clamp_min(0)])


def queries(where_BL: Tensor, span_BL: Tensor, vocabulary: SharedVocabulary) -> Queries:
    """Where to evaluate which span: for every span of the vocabulary, the flat positions of `where_BL` that draw
    from it (perhaps none)."""
    flat_P = torch.nonzero(where_BL.flatten()).flatten()
    span_P = span_BL.flatten()[flat_P]
    return [(flat_P[span_P == index], span) for index, (_, _, span) in enumerate(vocabulary.flat_spans)]


def weighted_nats(
    logits: Sequence[Tensor], asked: Queries, batch: TokenBatch, corrupted: CorruptedTokens, weighted: bool = True
) -> Tensor:
    """w(t)·Σ cross-entropy of each segment, nats_S in fp32 (fp64 for fp64 logits); plain sums where not `weighted`.

    Args:
        logits: one [N, V] tensor for each of `asked`, as the transformer returns them.
    """
    exact = torch.promote_types(logits[0].dtype, torch.float32)
    nats_S = torch.zeros(len(corrupted.weight_S), dtype=exact, device=batch.ids_BL.device)
    ids_P, segment_P = batch.ids_BL.flatten(), batch.segment_BL.flatten()
    for logits_NV, (index_N, (start, _)) in zip(logits, asked, strict=True):
        loss_N = F.cross_entropy(logits_NV.to(exact), ids_P[index_N] - start, reduction="none")
        nats_S = nats_S.index_add(0, segment_P[index_N], loss_N)
    return nats_S * corrupted.weight_S if weighted else nats_S


@dataclass(frozen=True)
class Objective:
    """How weighted cross-entropies become one training loss, normalised over the whole optimizer step.

    Attributes:
        schedule: noise schedule.
        weighting: "elbo", w(t) of the bound; "none", 1 for every masked token (as MaskGIT and MUSE train).
        normalisation: divide by "targets", all target tokens, masked or not (LLaDA); or by "masked", the masked ones.
        loss_weights: tokenizer name -> what a token of it counts, in the sum and in what that is divided by; 1 where
            not named. A caption has few tokens beside a picture's: more than 1 keeps it from drowning.
    """

    schedule: Schedule = field(default_factory=LogLinear)
    weighting: Literal["elbo", "none"] = "elbo"
    normalisation: Literal["targets", "masked"] = "targets"
    loss_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bad := [name for name, value in self.loss_weights.items() if not 0 < value < math.inf]:
            raise ValueError(f"objective: loss_weights of {bad[0]!r} must be a number above 0")
        if self.weighting not in ("elbo", "none") or self.normalisation not in ("targets", "masked"):
            raise ValueError("objective: weighting is elbo or none, normalisation is targets or masked")

    def __call__(
        self,
        logits: Sequence[Tensor],
        asked: Queries,
        batch: TokenBatch,
        corrupted: CorruptedTokens,
        vocabulary: SharedVocabulary,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and what it is to be divided by.

        Every token counts the same wherever it is only if both are summed over all ranks and all batches of an
        optimizer step before one is divided by the other.
        """
        nats_S = weighted_nats(logits, asked, batch, corrupted, weighted=self.weighting == "elbo")
        counted_BL = corrupted.target_BL if self.normalisation == "targets" else corrupted.predicted_BL
        loss_weights = torch.tensor([self.loss_weights.get(name, 1.0) for name in vocabulary.tokenizers])
        weight_of_S = loss_weights.to(nats_S.device)[batch.tokenizer_S]
        return (nats_S * weight_of_S).sum(), weight_of_S[batch.segment_BL[counted_BL]].sum()
