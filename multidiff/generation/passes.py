"""Forward passes for decoding: which tokens the transformer computes, and what is read of it.

A document is seen in several *views*: with its condition, and by each null of guidance without. All views of all
documents are laid out one after another as one flat batch, and a pass computes the documents and views that it needs.
With a cache each view of each document has its place in it, and a pass computes only some tokens of a document.

Where attention has an order, nothing after the block that is being decided is computed. With the exact cache, blocks
before it are computed once more when they are decided, and not again. With causal attention every code is a block, and
its logits are read at the token before it.

Tables stay on the CPU; only what the transformer sees and its logits are on its device.

Shape suffixes: P tokens of the batch, X = P times the views, A those that a pass computes, D documents, R documents
that have unknown codes of a tokenizer, N such codes of a document, M positions whose logits are read, V local ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multidiff.generation.runs import SamplerRun
from multidiff.models import KeyValueCache, MaskedDiffusionTransformer
from multidiff.sequence import MASK, SharedVocabulary, TokenBatch, TokenBlocks

Active = Sequence[tuple[SamplerRun, Tensor]]  # runs, and where_RN of each


class Passes:
    """The forward passes of one batch.

    Args:
        transformer, vocabulary: the denoiser and its layout.
        batch: the documents.
        nulls: null_P by condition, "" for all of them: the tokens that the null does not see.
        cache_mode: "none", "exact", "approximate_prefix" or "approximate_dual".
        divergence: compare the logits of a cached pass with those of a whole one, at the cost of that.
    """

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        vocabulary: SharedVocabulary,
        batch: TokenBatch,
        nulls: Mapping[str, Tensor],
        cache_mode: str,
        divergence: bool,
    ):
        self.transformer, self.vocabulary, self.batch = transformer, vocabulary, batch
        self._nulls, self._mode, self._compare = nulls, cache_mode, divergence
        self._device, self._exact = transformer.device, torch.promote_types(transformer.dtype, torch.float32)
        views, tokens = 1 + len(nulls), len(batch.ids_P)
        starts = batch.document_starts
        self._starts = torch.cat(
            [*(starts[:-1] + view * tokens for view in range(views)), starts[-1:] + (views - 1) * tokens]
        )
        self._positions_X3 = self._sent(batch.positions_P3).repeat(views, 1)
        self._coords_X3 = self._sent(batch.coords_P3).repeat(views, 1)
        self._document_P = batch.document_P
        self._cache = None if cache_mode == "none" else KeyValueCache(views * tokens)
        self._pattern, self._number_P = transformer.pattern, transformer.pattern.numbers(batch)
        self._settled_X = torch.zeros(views * tokens, dtype=torch.bool)  # decided, and computed since
        self._read_before = int(transformer.pattern.is_autoregressive)
        self._differences: list[Tensor] = []
        self.reads_noise = bool(transformer.config["time_input"])

    @property
    def divergence(self) -> float | None:
        """Mean total variation, ½ Σ |p - q|, between the distributions with and without cache, over all positions that
        a cached pass read; None where it was not measured."""
        if not self._compare:
            return None
        return float(torch.cat(self._differences).mean()) if self._differences else 0.0

    def logits(
        self, ids_P: Tensor, runs: Sequence[SamplerRun], active: Active, needed: Mapping[int, set[str]]
    ) -> dict[str, list[Tensor]]:
        """Local logits by tokenizer, logits_MV of the condition, then of each null; -inf beyond a level's span. They
        are log-probabilities where they are compared with others. A null that a document does not ask for has those of
        the condition.

        Args:
            ids_P: shared ids as they stand.
            runs: all runs, for a block of any of them has changed since it was cached.
            active: runs and the positions whose logits they need.
            needed: the documents that need logits, and the conditions whose nulls they need.
        """
        needed_UD = torch.zeros(1 + len(self._nulls), self.batch.num_documents, dtype=torch.bool)
        for document, keys in needed.items():
            needed_UD[[0, *(1 + list(self._nulls).index(key) for key in keys)], document] = True
        ids_X = torch.cat([ids_P, *(torch.where(null_P, MASK, ids_P) for null_P in self._nulls.values())])
        noise_X = self._noise(runs) if self.reads_noise else None
        whole_X = needed_UD[:, self._document_P].flatten()
        decided_P = torch.zeros_like(self.batch.known_P)
        if not self._pattern.is_full:
            seen_P, decided_P = self._order(active)
            whole_X &= seen_P.repeat(len(needed_UD))
        if self._cache is None:
            return self._read(ids_X, noise_X, whole_X, active, None)
        if self._mode == "exact":
            begins_D = torch.zeros(self.batch.num_documents, dtype=torch.bool)
            computed_X = whole_X & ~self._settled_X
            for run, where_RN in active:
                computed_X.view(len(needed_UD), -1)[:, run.place_RN[where_RN] - self._read_before] = True
            computed_X &= whole_X
        else:
            part_P, begins_D = self._parts(runs, needed_UD[0])
            computed_X = whole_X & part_P.repeat(len(needed_UD))
        logits = self._read(ids_X, noise_X, computed_X, active, self._cache)
        self._settled_X |= computed_X & decided_P.repeat(len(needed_UD))
        if self._compare and bool((needed_UD[0] & ~begins_D).any()):
            uncached = self._read(ids_X, noise_X, whole_X, active, None)
            for run, where_RN in active:
                row_M = torch.nonzero(where_RN)[:, 0]
                cached = self._sent(torch.nonzero(~begins_D[torch.tensor(run.documents)[row_M]]).flatten())
                difference_MV = logits[run.name][0].exp() - uncached[run.name][0].exp()
                self._differences.append(difference_MV[cached].abs().sum(-1) / 2)
        return logits

    def _noise(self, runs: Sequence[SamplerRun]) -> Tensor:
        """float32 [X]: how much noise there is at each token; nulls are all noise where they see nothing."""
        noise_P = torch.zeros(len(self.batch.ids_P))
        for run in runs:
            there_RN = run.sample_RN >= 0
            noise_RN = run.state.noise_R[:, None].expand_as(there_RN)
            if not self._pattern.is_full:  # each block has its own: the share of its positions that are undecided
                block_RN = run.state.block_RN.clamp_min(0)
                none_RB = torch.zeros(len(block_RN), int(block_RN.max()) + 1)
                open_RB, size_RB = (
                    none_RB.scatter_add(1, block_RN, of_RN.float()) for of_RN in (run.state.undecided_RN, there_RN)
                )
                noise_RN = (open_RB / size_RB.clamp_min(1)).gather(1, block_RN)
            noise_P[run.place_RN[there_RN]] = noise_RN[there_RN].float()
        return torch.cat([noise_P, *(noise_P.masked_fill(null_P, 1.0) for null_P in self._nulls.values())])

    def _order(self, active: Active) -> tuple[Tensor, Tensor]:
        """The tokens of each document that the logits depend on, seen_P, and those in blocks before the one that is
        being decided, decided_P."""
        asked_D = torch.full((self.batch.num_documents,), -1)
        for run, where_RN in active:
            place_M = run.place_RN[where_RN]
            asked_D.scatter_reduce_(0, self._document_P[place_M], self._number_P[place_M], "amax")
        asked_P = asked_D[self._document_P]
        return self._number_P <= asked_P - self._read_before, self._number_P < asked_P

    def _parts(self, runs: Sequence[SamplerRun], needed_D: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens to compute, part_P, and the documents that begin a block, which are computed whole."""
        begins_D, part_P = torch.zeros_like(needed_D), torch.zeros_like(self.batch.known_P)
        for run in runs:
            block_R, row_R = run.state.current_block_R, torch.tensor(run.documents)
            begins_D[row_R] |= needed_D[row_R] & (block_R != run.block_R)
            run.block_R = torch.where(needed_D[row_R], block_R, run.block_R)
            part_P[run.place_RN[run.state.block_RN == block_R[:, None]]] = True
        if self._mode == "approximate_prefix":  # what follows the block in its document as well
            begun_P = part_P.cumsum(0)
            before_D = torch.cat([begun_P.new_zeros(1), begun_P])[self.batch.document_starts[:-1].long()]
            part_P = begun_P > before_D[self._document_P]
        return part_P | begins_D[self._document_P], begins_D

    def _read(
        self,
        ids_X: Tensor,
        noise_X: Tensor | None,
        computed_X: Tensor,
        active: Active,
        cache: KeyValueCache | None,
    ) -> dict[str, list[Tensor]]:
        views, tokens = 1 + len(self._nulls), len(self.batch.ids_P)
        index_A = torch.nonzero(computed_X).flatten()
        # Where each token is in what the transformer is given: all of X with a cache, else what is computed.
        place_X = torch.arange(len(ids_X)) if cache is not None else computed_X.cumsum(0) - 1
        starts = self._starts
        if cache is None:
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), computed_X.cumsum(0)])[starts.long()].unique()
        positions, readers = [], []
        for name, level, span in self.vocabulary.flat_spans:
            parts, readers_of_span = [], []
            for run, where_RN in active:
                if run.name != name:
                    continue
                entry_N = torch.nonzero(run.state.levels_RN[where_RN] == level).flatten()
                at_N = run.place_RN[where_RN][entry_N] - self._read_before
                for view in range(views):
                    reached_N = computed_X[view * tokens + at_N]
                    parts.append(place_X[view * tokens + at_N[reached_N]])
                    readers_of_span.append((view, entry_N[reached_N]))
            positions.append((torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64), span))
            readers.append(readers_of_span)
        everything = cache is not None or len(index_A) == len(ids_X)
        index = None if everything else self._sent(index_A)
        blocks = None
        if not self._pattern.is_full:
            number_X = self._number_P.repeat(views)
            blocks = TokenBlocks.clean(number_X if everything else number_X[index_A])
        logits = self.transformer(
            self._sent(ids_X if everything else ids_X[index_A]),
            self._positions_X3 if index is None else self._positions_X3[index],
            starts,
            positions,
            self._coords_X3 if index is None else self._coords_X3[index],
            noise_P=None if noise_X is None else self._sent(noise_X if everything else noise_X[index_A]),
            cache=cache,
            active_A=None if cache is None else index_A,
            blocks=blocks,
        )
        result = {}
        compared = views > 1 or self._compare  # else a constant says nothing
        for run, where_RN in active:
            shape = (int(where_RN.sum()), run.state.mask_token_id)
            values = [torch.full(shape, -torch.inf, dtype=self._exact, device=self._device) for _ in range(views)]
            filled = [torch.zeros(shape[0], dtype=torch.bool) for _ in range(views)]
            for (name, _, (start, stop)), readers_of_span, logits_NV in zip(
                self.vocabulary.flat_spans, readers, logits, strict=True
            ):
                if name == run.name:
                    parts = logits_NV.split([len(entry_N) for _, entry_N in readers_of_span])
                    for (view, entry_N), part_NV in zip(readers_of_span, parts, strict=True):
                        part_NV = part_NV.to(self._exact)
                        if compared:
                            part_NV = torch.log_softmax(part_NV, -1)
                        values[view][self._sent(entry_N), : stop - start] = part_NV
                        filled[view][entry_N] = True
            for view in range(1, views):
                rest = torch.nonzero(~filled[view]).flatten()
                if len(rest):
                    rest = self._sent(rest)
                    values[view][rest] = values[0][rest]
            result[run.name] = values
        return result

    def _sent(self, table: Tensor) -> Tensor:
        """A table on the transformer's device, without waiting for what is still computed there."""
        return table.to(self._device, non_blocking=True)
