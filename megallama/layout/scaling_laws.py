"""Compute-optimal sizes by published fits of the loss or of its optimum over compute C = 6 N D. Pure.

N counts parameters, D tokens, C floating-point operations of training, L = E + A / N^alpha + B / D^beta nats per token
on the corpus of the fit: the loss is for comparing sizes with each other and no forecast for other data or tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS_PER_PARAMETER_AND_TOKEN = 6


@dataclass(frozen=True)
class LossFit:
    """One published fit of the loss over parameters and tokens."""

    name: str
    source: str
    irreducible: float
    parameter_scale: float
    token_scale: float
    parameter_exponent: float
    token_exponent: float

    @property
    def parameters_over_compute(self) -> float:
        """a in N* ~ C^a."""
        return self.token_exponent / (self.parameter_exponent + self.token_exponent)

    @property
    def balance(self) -> float:
        """G of arXiv 2203.15556, equation 4."""
        ratio = (self.parameter_exponent * self.parameter_scale) / (self.token_exponent * self.token_scale)
        return float(ratio ** (1 / (self.parameter_exponent + self.token_exponent)))

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss in nats per token."""
        return float(
            self.irreducible
            + self.parameter_scale / parameters**self.parameter_exponent
            + self.token_scale / tokens**self.token_exponent
        )

    def optimal_for_compute(self, flops: float) -> tuple[float, float]:
        """(N*, D*) with the least loss at 6 N D = flops."""
        share = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        parameters = self.balance * share**self.parameters_over_compute
        return parameters, share / parameters

    def optimal_tokens(self, parameters: float) -> float:
        """D for which `parameters` is the compute-optimal size."""
        share = (parameters / self.balance) ** (1 / self.parameters_over_compute)
        return float(share / parameters)

    def optimal_parameters(self, tokens: float) -> float:
        """N for which `tokens` is the compute-optimal amount of data."""
        share = (tokens * self.balance) ** (1 / (1 - self.parameters_over_compute))
        return float(share / tokens)


@dataclass(frozen=True)
class PowerLaw:
    """N* = N0 * (C / C0)^a and D* = C / (6 N*), anchored at one published row."""

    name: str
    source: str
    anchor_parameters: float
    anchor_flops: float
    parameters_over_compute: float

    @classmethod
    def from_tokens(cls, name: str, source: str, scale: float, exponent: float) -> PowerLaw:
        """The same law where it is in print as D* = scale * C^exponent."""
        return cls(name, source, 1 / (FLOPS_PER_PARAMETER_AND_TOKEN * scale), 1.0, 1 - exponent)

    def optimal_for_compute(self, flops: float) -> tuple[float, float]:
        """(N*, D*) at 6 N D = flops."""
        parameters = self.anchor_parameters * (flops / self.anchor_flops) ** self.parameters_over_compute
        return parameters, flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters

    def optimal_tokens(self, parameters: float) -> float:
        """D for which `parameters` is the compute-optimal size."""
        flops = self.anchor_flops * (parameters / self.anchor_parameters) ** (1 / self.parameters_over_compute)
        return float(flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters)

    def optimal_parameters(self, tokens: float) -> float:
        """N for which `tokens` is the compute-optimal amount of data."""
        _, anchor_tokens = self.optimal_for_compute(self.anchor_flops)
        share = (tokens / anchor_tokens) ** (1 / (1 - self.parameters_over_compute))
        return float(self.anchor_flops * share / FLOPS_PER_PARAMETER_AND_TOKEN / tokens)


BESIROGLU = LossFit(
    "Besiroglu et al.", "arXiv 2404.10102", irreducible=1.8169, parameter_scale=482.01, token_scale=2085.43,
    parameter_exponent=0.3478, token_exponent=0.3658,
)  # fmt: skip
# Exponents of Table 2; the anchors are the 10B rows of Table 3 and, for approach 2, of Table A3.
HOFFMANN_1 = PowerLaw("Hoffmann et al., approach 1", "arXiv 2203.15556, tables 2 and 3", 10e9, 1.23e22, 0.50)
HOFFMANN_2 = PowerLaw("Hoffmann et al., approach 2", "arXiv 2203.15556, tables 2 and A3", 10e9, 1.32e22, 0.49)
# The pair of the figure's legend: for 3.8e25 FLOPs it gives 16.3T tokens, where the paper states 16.55T; that of the
# text, 0.29 and 0.53, is rounded and gives 10.5T.
LLAMA_3 = PowerLaw.from_tokens("Llama 3", "arXiv 2407.21783, section 3.2.1", 0.299, 0.537)
FITS: tuple[LossFit | PowerLaw, ...] = (BESIROGLU, HOFFMANN_1, HOFFMANN_2, LLAMA_3)
DEFAULT_FIT = BESIROGLU


def optimal_tokens(parameters: float) -> float:
    """Compute-optimal tokens for a model size by the default fit."""
    return DEFAULT_FIT.optimal_tokens(parameters)
