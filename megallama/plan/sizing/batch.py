"""Batch sizes and learning rates by published laws: they differ twofold and more, so the answer is a range. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megallama.layout.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN


@dataclass(frozen=True)
class Advice:
    """What one source would take."""

    name: str
    source: str
    value: float


@dataclass(frozen=True)
class Range:
    """What several sources would take; begin within it and measure."""

    advice: tuple[Advice, ...]

    @property
    def low(self) -> float:
        """The least of them."""
        return min(each.value for each in self.advice)

    @property
    def high(self) -> float:
        """The largest of them."""
        return max(each.value for each in self.advice)


@dataclass(frozen=True)
class _Run:
    """What a published run took."""

    name: str
    parameters: float
    learning_rate: float
    batch_tokens: float
    source: str


_RUNS = (
    _Run("TinyLlama 1.1B", 1.10e9, 4e-4, 2e6, "repository TinyLlama, README"),
    _Run("Llama 2 7B", 6.74e9, 3e-4, 4e6, "repository llama-models, model card of Llama 2"),
    _Run("Llama 2 13B", 13.0e9, 3e-4, 4e6, "repository llama-models, model card of Llama 2"),
    _Run("Llama 2 70B", 69.0e9, 1.5e-4, 4e6, "repository llama-models, model card of Llama 2"),
    # The batch after 2.87e12 tokens; it began at 4e6.
    _Run("Llama 3.1 405B", 405.9e9, 8e-5, 16e6, "arXiv 2407.21783, section 3.4.1"),
)
_LADDER = ("OLMo-core ladder", "repository OLMo-core, model_ladder, after arXiv 2406.19146; for sequences of 2048")
_STEP_LAW = ("Step Law", "arXiv 2503.04715; fitted up to 1e9 parameters and 1e11 tokens")
_DEEPSEEK = ("DeepSeek LLM", "arXiv 2401.02954, section 3.1")


def batch_tokens(parameters: float, without_tables: float, tokens: float) -> Range:
    """Tokens per optimizer step for a run of `tokens`; `without_tables` leaves embedding and head out of `parameters`.

    The compute that DeepSeek LLM scales with counts neither table; its attention is left out here.
    """
    compute = FLOPS_PER_PARAMETER_AND_TOKEN * without_tables * tokens
    run = _nearest_run(parameters)
    return Range(
        (
            Advice(*_LADDER, 2048 * 160 * (parameters / 108e6) ** (2 / 3)),
            Advice(*_STEP_LAW, 0.58 * tokens**0.571),
            Advice(*_DEEPSEEK, 0.2920 * compute**0.3271),
            Advice(run.name, f"run nearest in size; {run.source}", run.batch_tokens),
        )
    )


def learning_rates(parameters: float, without_tables: float, tokens: float) -> Range:
    """Peak learning rates of AdamW for the same; the ladder's is halved, as OLMo-core does for a rate held constant."""
    compute = FLOPS_PER_PARAMETER_AND_TOKEN * without_tables * tokens
    run = _nearest_run(parameters)
    return Range(
        (
            Advice(*_LADDER, 0.0047 * (parameters / 108e6) ** (-1 / 3) / 2),
            Advice(*_STEP_LAW, 1.79 * without_tables**-0.713 * tokens**0.307),
            Advice(*_DEEPSEEK, 0.3118 * compute**-0.125),
            Advice(run.name, f"run nearest in size; {run.source}", run.learning_rate),
        )
    )


def _nearest_run(parameters: float) -> _Run:
    return min(_RUNS, key=lambda run: abs(math.log(run.parameters / parameters)))
