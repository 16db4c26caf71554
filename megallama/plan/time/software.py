"""What a predicted step assumes of the software that runs it, as named sets: `software.yaml`. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megallama.config.load import parse_yaml
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.compiled import compiles
from megallama.layout.counts import count_parameters
from megallama.layout.schedules import schedule_of

DEFAULT = "megallama"
ATTENTION_RATE = 0.5
"""FlashAttention-2 reaches 35 % of an H100's peak (arXiv 2407.08608, abstract) where matmuls reach 80 %, the first
FlashAttention 25 to 50 % of an A100's (arXiv 2307.08691, section 1) where they reach 87 %: about half."""
Kernels = Literal["separate", "fused", "config"]


class Recomputed(BaseModel):
    """Shares of the layers' forward that backward computes again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    """Norms, rotations and activations."""
    activation: float = 0.0
    """Activations, where norms and rotations are not computed again."""


class Software(BaseModel):
    """The assumptions of one program; the defaults are those of plain torch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    generation: str | None = None
    """The constant of matmuls that it shares with others; its own name where None."""
    overlap: frozenset[Literal["tensor", "columns", "pipeline", "data"]] = frozenset()
    """Communication that hides behind computation where there is enough of it; `columns`: of the tensor-parallel that
    of column-parallel layers in backward, beside their matmuls."""
    kernels: Kernels = "config"
    """Norms, rotations and activations: one kernel each, by a compiler or by hand, or torch's own."""
    loss: Kernels = "separate"
    gradients: Literal["zero", "reduce_scatter", "all_reduce"] = "zero"
    """How data-parallel copies sum them: as DeepSpeed's ZeRO stage does, each part in its place, or all everywhere."""
    sums: float = 0.0
    """Bytes moved for each parameter and micro-batch to add bf16 gradients up in fp32."""
    selective: Recomputed | None = None
    """What train.recompute=selective computes again; None for the product of SwiGLU."""
    attention: dict[str, float] = {}
    """Rate of the attention kernel over that of matmuls, by the key of a chip; ATTENTION_RATE on others."""

    def fuses(self, what: Literal["kernels", "loss"], config: RunConfig) -> bool:
        """Whether these are one kernel each in that run."""
        chosen: Kernels = getattr(self, what)
        if chosen == "config":
            return compiles(config, config.train.device != "cpu")
        return chosen == "fused"

    def optimizer_ranks(self, dp: int) -> int:
        """Copies that share the state of the optimizer."""
        return 1 if self.gradients == "all_reduce" else dp

    def attention_rate(self, gpu: Gpu) -> float:
        """Rate of the attention kernel over that of matmuls."""
        return self.attention.get(gpu.efficiency_of or gpu.key, ATTENTION_RATE)

    def recomputed(self, config: RunConfig) -> Recomputed:
        """What backward computes again of the layers of a run.

        A backward in two parts computes again in each; that of DualPipeV is whole but for a few. Recomputation of a
        layer stops at the input of the down projection; in fp8 after it, since a function keeps its input when it is
        done.
        """
        recompute = config.train.recompute
        if recompute == "none":
            return Recomputed()
        times = 2.0 if schedule_of(config.parallel).splits_backward == "always" else 1.0
        model = config.model
        down = model.hidden_size * model.intermediate_size / count_parameters(model).matmul_per_layer
        fp8 = config.train.matmul != "dtype"
        if recompute == "selective":
            return self.selective or Recomputed(activation=times, matmul=times * down if fp8 else 0.0)
        down = 0.0 if fp8 else down
        return Recomputed(matmul=times * (1 - down), attention=times, elementwise=times)


@cache
def known_software() -> dict[str, Software]:
    """Every set by its name."""
    path = Path(__file__).with_name("software.yaml")
    tree = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    return {name: Software(name=name, **(fields or {})) for name, fields in tree.items()}


@dataclass(frozen=True)
class Machine:
    """What a step runs on."""

    gpu: Gpu
    software: Software
    efficiency: float
    """The share of the peak at which matmuls run."""
    mfu: float | None = None
    """Assumed for the whole step, in the full convention, in place of all that is predicted."""

    @property
    def matmul_flops(self) -> float:
        """FLOP/s of matmuls in training."""
        return self.gpu.known("peak_tflops") * 1e12 * self.efficiency


def find_software(gpu: Gpu, name: str = DEFAULT) -> Software:
    """The set of that name, or megallama's with a constant of `gpu` that has it; UserError for one that is neither."""
    every = known_software()
    if name in every:
        return every[name]
    if name in gpu.efficiency:
        return every[DEFAULT].model_copy(update={"generation": name})
    # Those with a constant on this GPU, so that what is proposed can be typed.
    usable = [each for each, software in every.items() if (software.generation or each) in gpu.efficiency]
    names = [DEFAULT, *usable, *gpu.efficiency]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(dict.fromkeys(names))}"
    raise UserError(f"--software={name} is not known; {hint}")


def machine(gpu: Gpu, software: Software | None = None, mfu: float | None = None) -> Machine:
    """`gpu` as that software uses it, megallama where None.

    UserError where it has no constant for it, and no `mfu` takes its place.
    """
    chosen = software or find_software(gpu)
    generation = chosen.generation or (None if chosen.name == DEFAULT else chosen.name)
    if mfu is None and generation is not None and generation not in gpu.efficiency:
        fitting = [name for name, one in known_software().items() if (one.generation or name) in gpu.efficiency]
        instead = f"use {', '.join(fitting)}, or assume" if fitting else "assume"
        raise UserError(f"--software={chosen.name} has no constant on {gpu.key}; {instead} a speed by --mfu 0.4")
    constant = gpu.default_efficiency if generation is None else lambda: gpu.efficiency[generation]
    return Machine(gpu, chosen, constant() if mfu is None else 1.0, mfu)
