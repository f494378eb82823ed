"""The parts of a `MaskSampler`, and which of their settings contradict each other.

Each part checks its own settings. What two parts do not allow together is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from multidiff.samplers.blocks import Blocks, cache_for
from multidiff.samplers.checks import refuse
from multidiff.samplers.guidance import Guidance
from multidiff.samplers.logit_rules import LogitRules
from multidiff.samplers.order import Order
from multidiff.samplers.remasking import Remasking
from multidiff.samplers.token_sampling import TokenSampling
from multidiff.samplers.unmasking import Unmasking
from multidiff.sequence.blocks import AttentionPattern

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Parts:
    """The parts of a sampler.

    Raises:
        ValueError: settings of two parts that do not go together.
    """

    order: Order
    blocks: Blocks
    unmasking: Unmasking
    remasking: Remasking
    token_sampling: TokenSampling
    rules: LogitRules
    guidance: Guidance

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Parts:
        """The parts of flat settings, which hold every part's fields by name."""
        return cls(
            order=_part(Order, settings),
            blocks=_part(Blocks, settings),
            unmasking=_part(Unmasking, settings),
            remasking=_part(Remasking, settings),
            token_sampling=_part(TokenSampling, settings),
            rules=_part(LogitRules, settings),
            guidance=_part(Guidance, settings),
        )

    @property
    def reads(self) -> list[str]:
        """The attributes of `Candidates` that the parts look at, beside the token and its probability."""
        return [
            *(["margin_M"] if self.order.order == "margin" else []),
            *(["entropy_M"] if self.order.order == "entropy" else []),
            *(["best_M", "best_probs_M"] if self.remasking.edits else []),
        ]

    def __post_init__(self) -> None:
        order, unmasking, remask = self.order.order, self.unmasking.unmasking, self.remasking.remask
        adaptive, ancestral = self.unmasking.is_adaptive, unmasking == "ancestral"
        orders = {"threshold": "confidence", "factor": "confidence", "entropy_bound": "entropy", "ancestral": "random"}
        if orders.get(unmasking, order) != order:
            refuse(("unmasking", unmasking), ("order", order))
        if adaptive and self.order.order_temperature:
            refuse(("unmasking", unmasking), ("order_temperature", self.order.order_temperature))
        if (adaptive or ancestral) and self.order.level_penalty:
            refuse(("unmasking", unmasking), ("level_penalty", self.order.level_penalty))
        if ancestral and self.blocks.block_length is not None:
            refuse(("unmasking", unmasking), ("block_length", self.blocks.block_length))
        if adaptive and self.guidance.guidance_schedule != "constant":
            refuse(("unmasking", unmasking), ("guidance_schedule", self.guidance.guidance_schedule))
        if remask == "edit" and self.rules.repetition_penalty != 1:
            refuse(("remask", remask), ("repetition_penalty", self.rules.repetition_penalty))
        if self.remasking.masks_again and not ancestral:
            refuse(("remask", remask), ("unmasking", unmasking))
        if self.blocks.cache not in ("auto", "none") and remask != "none":
            refuse(("cache", self.blocks.cache), ("remask", remask))

    def check_draft(self, *, complete: bool) -> None:
        """Refuse settings that cannot go on from a draft.

        Args:
            complete: whether a draft leaves no code undecided.

        Raises:
            ValueError: it names the setting.
        """
        unmasking, remask = self.unmasking.unmasking, self.remasking.remask
        if remask == "conf":
            raise ValueError(
                "remask 'conf' does not go with a draft, of whose codes nobody knows how probable they were."
            )
        if complete and remask == "none":
            raise ValueError(
                "remask 'none' changes nothing of a draft that is complete. Set remask to 'edit' (or to another one, "
                "with unmasking 'ancestral'), or leave some codes undecided."
            )
        if complete and self.unmasking.is_adaptive:
            raise ValueError(
                f"unmasking {unmasking!r} stops once all is decided, so it changes nothing of a draft that is complete."
            )

    def check_pattern(self, pattern: AttentionPattern) -> None:
        """Refuse settings that do not fit a model's attention.

        Raises:
            ValueError: it names the setting and the attention.
        """
        cache_for(self.blocks.cache, pattern)
        self.blocks.check_pattern(pattern)
        if pattern.is_full:
            return
        unmasking, remask = self.unmasking.unmasking, self.remasking.remask
        if unmasking == "ancestral":  # it decides any position at any time
            raise ValueError(f"unmasking 'ancestral' does not go with a model of {pattern}.")
        if remask != "none":  # what follows has seen decided blocks as they are
            raise ValueError(f"remask {remask!r} does not go with a model of {pattern}.")


def _part(kind: type[_Part], settings: Mapping[str, Any]) -> _Part:
    return kind(**{field.name: settings[field.name] for field in fields(kind)})  # pyright: ignore[reportArgumentType]
