"""Mutants of what saves memory in long sequences: MLPs in tiles, and inputs of layers away from the device."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LLAMA = "model/llama.py"
TILED = "model/tiled_mlp.py"
OFFLOAD = "model/offload.py"
SPLIT = "pp2-zbvzerobubble-full"

OF_MEMORY = [
    Mutant(
        "tiles-without-copy-to",
        LLAMA,
        "x = x if gates.sequence_parallel else copy_to(x, gates.tp)\n",
        "\n",
        "gradient",
        "the gradient of the input of an MLP in tiles is this rank's share",
        "tp2-nosp-full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-input-not-summed",
        TILED,
        "sum_scatter(by_x, SEQUENCE, ctx.axis)",
        "by_x.chunk(ctx.axis.size, SEQUENCE)[ctx.axis.rank]",
        "gradient",
        "the gradient of the input of an MLP in tiles misses the other ranks' shares",
        "tp2-full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-weights-of-its-own-part",
        TILED,
        "whole = all_gather(ctx.kept.saved_tensors[0], SEQUENCE, ctx.axis)",
        "whole = torch.cat([ctx.kept.saved_tensors[0]] * ctx.axis.size, SEQUENCE)",
        "gradient",
        "backward takes this rank's part of the sequence for the others'",
        "tp2-full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-last-left-out",
        TILED,
        ".split(tile(gate_up.shape[0])) for",
        ".split(tile(gate_up.shape[0]))[:-1] for",
        "other",
        "the tokens of the last tile have what was in memory as their result",
        "full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-of-the-hidden-size",
        TILED,
        "split(tile(gate_up.shape[0]))",
        "split(tile(gate_up.shape[1]))",
        "other",
        "a tile has more of gate and up than the bound",
        "full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-gradient-of-the-last",
        TILED,
        "by_gate_up += gates.t() @ tokens",
        "by_gate_up = gates.t() @ tokens",
        "gradient",
        "the gradient of gate and up is of the last tile",
        "full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-summed-in-bf16",
        TILED,
        "dtype=torch.promote_types(weight.dtype, torch.float32)",
        "dtype=weight.dtype",
        "gradient",
        "each tile's gradient is rounded as it joins the sum",
        "full",
        reason="verify has too few tiles for the bounds of bf16, and types know no rounding",
        words=("--dtype", "bf16"),
        in_tiles=True,
    ),
    Mutant(
        "tiles-up-before-gate",
        TILED,
        """            gate.copy_(torch.ops.aten.silu_backward(up, gate))
            torch.mul(product, active, out=up)
""",
        """            torch.mul(product, active, out=up)
            gate.copy_(torch.ops.aten.silu_backward(up, gate))
""",
        "gradient",
        "the gradient of up takes the place of what that of gate is computed from",
        "full",
        in_tiles=True,
    ),
    Mutant(
        "tiles-inputs-and-weights-swapped",
        TILED,
        "if ctx.part.weights and asked",
        "if ctx.part.inputs and asked",
        "gradient",
        "in a split backward weights of tiles get their gradients with the inputs, where they are dropped",
        SPLIT,
        in_tiles=True,
    ),
    Mutant(
        "tiles-end-before-gate-and-up",
        TILED,
        "if by_x is None and by_gate_up is None:",
        "if by_x is None:",
        "gradient",
        "in a split backward gate and up of tiles have gradients of zero",
        SPLIT,
        in_tiles=True,
    ),
    Mutant(
        "tiles-run-again",
        TILED,
        "_TiledMLP.apply(kept, gate_up, down, kept.grad_fn, axis, part)",
        "_TiledMLP.apply(kept, gate_up, down, None, axis, part)",
        "other",
        "recomputation runs the tiles, whose result nobody reads",
        "full",
        in_tiles=True,
    ),
    Mutant(
        "offload-gives-the-neighbour",
        OFFLOAD,
        "return arriving.tensor",
        "return (self._arriving or arriving).tensor",
        "gradient",
        "a layer is computed again from the input of the one below it",
        "offload",
    ),
    Mutant(
        "offload-takes-what-arrives",
        OFFLOAD,
        "if arriving is None or arriving.index != index:",
        "if arriving is None:",
        "gradient",
        "a layer is computed again from whichever input is on its way",
        "pp2-zbvzerobubble-offload",
        reason="each part of verify's backwards goes one way to its end, where what is on its way is what is asked for",
    ),
    Mutant(
        "offload-one-way-alone",
        OFFLOAD,
        "following = index + 1 if index > self._last else index - 1",
        "following = index - 1",
        "other",
        "in the weights' part of a split backward inputs come back twice",
        "pp2-zbvzerobubble-offload",
    ),
]
