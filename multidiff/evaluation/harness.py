"""Adapter to EleutherAI's lm-evaluation-harness (`lm-eval`, the extra `lm-eval`): texts of a model in its tasks.

    python -m multidiff.evaluation.harness run --model multidiff --model_args pretrained=runs/demo/model --tasks NAME

is the harness's own command with one more kind of model. From Python, give `lm_eval.simple_evaluate` a `MultiDiffLM`.

The likelihoods are estimates of a lower bound. The candidates of a question, which share a context, get the same masks
and canvases of one size, so that chance and length do not decide between them.

Shape suffix: N codes of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from multidiff.evaluation.conditional import Target, log_likelihood, room
from multidiff.generation import Blank, Filled, Given, Masked, MultiDiffPipeline
from multidiff.samplers import AncestralSampler, MaskSampler, Sampler
from multidiff.seeding import generator_for, key_for
from multidiff.tokenizer import Codes

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError('The adapter needs lm-eval: pip install "masked-multidiff[lm-eval]"') from error

Layout = Literal["text", "segments"]
_BATCH = 64
_GROUPS = 2**20  # numbers of random streams; their positions in a Kronecker sequence must be exact in float64
_DRAW = ("top_k", "top_p", "typical_p", "draw")


@register_model("multidiff")
class MultiDiffLM(LM):
    """A saved model as a model of the harness.

    Args:
        pretrained: a saved model: its folder, a Lightning checkpoint or a repository of the hub; or a live pipeline.
        tokenizer: the name of its text tokenizer; None takes the first whose modality is "text".
        layout: "text" makes context and continuation one text. "segments" makes them two segments, as models with
            questions and answers are trained; spaces at the beginning of the continuation are then left out.
        draws: masks drawn of each text; see `multidiff.evaluation.log_likelihood`.
        canvas: tokens of a text's canvas; None takes that of a blank in generation. A longer text gets a larger one.
        batch_size: documents of a forward pass; "auto" is 64.
        max_batch_size: not needed here; the harness always gives it.
        device: where the model runs; None is a GPU if there is one. Without a GPU it is always the CPU.
        seed: of masks and sampling.

    Raises:
        ValueError: an unknown layout or tokenizer, or a model without texts.
    """

    def __init__(
        self,
        pretrained: str | MultiDiffPipeline,
        tokenizer: str | None = None,
        layout: Layout = "text",
        draws: int = 32,
        canvas: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be {' or '.join(get_args(Layout))}, not {layout!r}.")
        if isinstance(pretrained, str):
            if device is None or not torch.cuda.is_available():  # the harness asks for cuda:0 on every machine
                device = "cuda" if torch.cuda.is_available() else "cpu"
            pretrained = MultiDiffPipeline.from_pretrained(pretrained, device=device)
            pretrained.set_progress_bar_config(disable=True)
        self.pipe = pretrained
        names = [name for name, one in pretrained.vocabulary.tokenizers.items() if one.modality == "text"]
        if tokenizer is None and not names:
            known = ", ".join(pretrained.vocabulary.tokenizers)
            raise ValueError(f"This model has no tokenizer for text. Its tokenizers are {known}.")
        self.name = tokenizer or names[0]
        if pretrained.vocabulary.layout(self.name).modality != "text":
            raise ValueError(f"The tokenizer {self.name!r} is not one for text, which are {', '.join(names)}.")
        self._unit = next(iter(pretrained.sequencer.canvas(self.name, {}).size))
        self.layout, self.draws, self.canvas, self.seed = layout, int(draws), canvas, seed
        self.batch_size = _BATCH if str(batch_size).startswith(("None", "auto")) else int(str(batch_size))
        self._sampler(0.0)  # a setting that does not fit is refused before anything is measured

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether greedy decoding gives the continuation, of each request.

        A continuation ends with its text: its EOS is measured with it.
        """
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        wholes = [self._encode(self._whole(context, continuation)) for context, continuation in pairs]
        lengths = {context: [self._units(self._encode(self._prefix(context)))] for context, _ in pairs}
        for (context, _), whole in zip(pairs, wholes, strict=True):
            lengths[context].append(self._units(whole))
        rooms = {context: self._room(some) for context, some in lengths.items()}
        documents = [
            self._document(context, whole, rooms[context]) for (context, _), whole in zip(pairs, wholes, strict=True)
        ]
        values = self._measure(documents, [context for context, _ in pairs])
        greedy = dict(zip(rooms, self._write(list(rooms), list(rooms.values()), temperature=0.0), strict=True))
        results = []
        for (context, continuation), whole, value in zip(pairs, wholes, values, strict=True):
            results.append((value, torch.equal(greedy[context].codes.ids_N, whole.ids_N)))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each with its EOS, without truncation."""
        texts = [request.args[0] for request in requests]
        sizes = [self._room([self._units(self._encode(text))]) for text in texts]
        documents = [[Target(self.name, text, **{self._unit: size})] for text, size in zip(texts, sizes, strict=True)]
        values = self._measure(documents, texts)
        for text, value in zip(texts, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return values

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop strings.

        The saved sampling settings are used, at temperature 0 unless the task sets `do_sample: true`. `max_gen_toks`
        is the room in tokens, 256 by default, and the canvas of a blank may leave less.
        """
        texts: dict[int, str] = {}
        waiting: dict[float, list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            waiting.setdefault(float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0, []).append(
                number
            )
        for temperature, numbers in waiting.items():
            contexts, sizes = [requests[number].args[0] for number in numbers], []
            for number, context in zip(numbers, contexts, strict=True):
                length = self._units(self._encode(self._prefix(context)))
                most = length + max(1, int(requests[number].args[1].get("max_gen_toks", 256)))
                sizes.append(min(self._room([length]), most))
            written = self._write(contexts, sizes, temperature)
            for number, context, filled in zip(numbers, contexts, written, strict=True):
                prefix = self._prefix(context)
                (restored,) = self.pipe.tokenizers[self.name].decode([self._encode(prefix)])
                text = filled.item.removeprefix(restored)
                if self.layout == "text":
                    text = text.removeprefix(context[len(prefix) :])
                until = requests[number].args[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [texts[number] for number in range(len(requests))]

    def _whole(self, context: str, continuation: str) -> str:
        """The text of the segment that holds a continuation."""
        return context + continuation if self.layout == "text" else continuation.lstrip()

    def _prefix(self, context: str) -> str:
        """What this segment begins with. Spaces between context and continuation belong to the latter, as in the words
        of most tokenizers."""
        return context.rstrip() if self.layout == "text" else ""

    def _encode(self, text: str) -> Codes:
        return self.pipe.tokenizers[self.name].encode([text])[0]

    def _units(self, codes: Codes) -> int:
        return codes.size[self._unit]

    def _room(self, lengths: Sequence[int]) -> int:
        """Tokens of the canvas for texts that are compared."""
        return room(self.pipe, self.name, lengths) if self.canvas is None else max(self.canvas, 1 + max(lengths))

    def _given(self, context: str) -> list[Given]:
        return [Given(self.name, context)] if self.layout == "segments" and context else []

    def _document(self, context: str, whole: Codes, size: int) -> list[Given | Blank | Masked | Target]:
        """The codes of a continuation as unknown. A piece that spans the end of the context is one of them."""
        prefix = self._encode(self._prefix(context))
        shared = min(len(prefix), len(whole))
        known_N = torch.zeros(len(whole), dtype=torch.bool)
        known_N[:shared] = (prefix.ids_N[:shared] == whole.ids_N[:shared]).cumprod(0).bool()
        return [*self._given(context), Masked(self.name, whole, known_N, size - self._units(whole))]

    def _measure(self, documents: Sequence[Sequence[Any]], keys: Sequence[str]) -> list[float]:
        """log p of each document's targets; those of one key have the same masks."""
        values = log_likelihood(
            self.pipe,
            documents,
            draws=self.draws,
            replicates=1,
            groups=[key_for(key) % _GROUPS for key in keys],
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return [value.nats for value in values]

    def _write(self, contexts: Sequence[str], sizes: Sequence[int], temperature: float) -> list[Filled]:
        """The segments that hold the continuations, written on canvases of these sizes."""
        documents = []
        for context, size in zip(contexts, sizes, strict=True):
            prefix = self._encode(self._prefix(context))
            if len(prefix):
                known_N = torch.ones(len(prefix), dtype=torch.bool)
                documents.append([Masked(self.name, prefix, known_N, size - self._units(prefix))])
            else:
                documents.append([*self._given(context), Blank(self.name, **{self._unit: size})])
        saved = self.pipe.samplers[self.name]
        self.pipe.samplers[self.name] = self._sampler(temperature)
        filled = []
        try:
            for start in range(0, len(documents), self.batch_size):
                some = slice(start, start + self.batch_size)
                generators = [generator_for(self.seed, "harness", context) for context in contexts[some]]
                filled += [row[-1] for row in self.pipe(documents[some], generator=generators).documents]
        finally:
            self.pipe.samplers[self.name] = saved
        return filled

    def _sampler(self, temperature: float) -> Sampler:
        """The model's sampler at another temperature; at 0 without what goes with a draw."""
        saved = self.pipe.samplers[self.name]
        if isinstance(saved, AncestralSampler):
            return AncestralSampler(saved.process, **{**saved.settings, "temperature": temperature})
        settings = saved.settings if isinstance(saved, MaskSampler) else {}
        if temperature == 0:
            settings = {key: value for key, value in settings.items() if key not in _DRAW}
        if not self.pipe.transformer.pattern.is_full:  # canvases differ in their number of blocks
            settings.pop("num_inference_steps", None)
        return MaskSampler.from_settings({**settings, "temperature": temperature}, self.name)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
