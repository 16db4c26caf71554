"""Models of megatron-core on a CPU: their checkpoints, logits and first losses. Runs in processes of its own."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

VOCABULARY, SEQUENCE, STEPS, LR, DECAY = 301, 48, 3, 1e-3, 0.1
PADDED = 304
SHAPE = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4}
EPSILON, LONGEST = 1e-3, 96  # large enough that leaving it out would show


@dataclass(frozen=True)
class Variant:
    """A model, and how its checkpoint is written."""

    groups: int = 4
    """num_query_groups: as many as heads, or fewer."""
    tied: bool = False
    gpt: dict[str, Any] = field(default_factory=dict)
    """Further arguments of GPTModel."""
    args: dict[str, Any] | None = None
    """What Megatron-LM would keep as its arguments; None for megatron-core alone, which keeps none."""
    metadata: dict[str, bool] | None = None
    """How sharded_state_dict lays out layers."""
    normed: bool = False
    """qk_layernorm."""
    masters: bool = False
    """bf16 weights, with the fp32 masters of the distributed optimizer beside them."""


def arguments(**changed: Any) -> dict[str, Any]:
    """Of the command line of Megatron-LM what describes this model."""
    return {
        **SHAPE,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": EPSILON,
        "swiglu": True,
        "add_bias_linear": False,
        "max_position_embeddings": LONGEST,
        "untie_embeddings_and_output_weights": True,
        "params_dtype": torch.float32,
        **changed,
    }


VARIANTS = {
    "plain": Variant(),
    "grouped": Variant(groups=2),
    "tied": Variant(groups=2, tied=True, args=arguments(untie_embeddings_and_output_weights=False)),
    "theta": Variant(gpt={"rotary_base": 500}, args=arguments(rotary_base=500)),
    "llama3": Variant(
        gpt={"rotary_base": 50_000, "rope_scaling": True, "rope_scaling_factor": 32.0},
        args=arguments(rotary_base=50_000, use_rope_scaling=True, rope_scaling_factor=32.0),
    ),
    "linear": Variant(
        gpt={"seq_len_interpolation_factor": 4.0}, args=arguments(rotary_seq_len_interpolation_factor=4.0)
    ),
    "stacked": Variant(groups=2, metadata={"non_homogeneous_layers": False}),
    "apart": Variant(groups=2, metadata={"singleton_local_shards": True}),
    "masters": Variant(groups=1, masters=True),
    "normed": Variant(groups=2, normed=True),
    "normed_args": Variant(groups=1, normed=True, args=arguments(qk_layernorm=True)),
}


def tokens() -> Tensor:
    """One batch and its labels: [4, SEQUENCE + 1]."""
    return torch.randint(VOCABULARY, (4, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))


class OnCpu(TorchFunctionMode):
    """What megatron-core asks of CUDA by name, on the CPU: nothing else in it needs a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and len(args) == 1 else result


def write(rank: int, tp: int, out: Path) -> None:
    """Of every variant a checkpoint in out/NAME, and its logits and losses in out/NAME.pt. A rank of `tp`."""
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    with OnCpu():
        _write(rank, tp, out)


def _write(rank: int, tp: int, out: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=tp, init_method=f"file://{out}/rendezvous")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    initialize_rng_tracker(inference_rng_tracker=True)  # the one that needs no CUDA; there is no dropout
    for name, variant in VARIANTS.items():
        if variant.masters:
            model = _save_with_masters(variant, tp, out / name)
        else:
            model = _model(variant, tp)
            _save(model.sharded_state_dict(metadata=variant.metadata), variant, out / name)
        outcome = {"logits": _logits(model), "losses": _losses(model)}
        if rank == 0:
            torch.save(outcome, out / f"{name}.pt")
    dist.destroy_process_group()


def _model(variant: Variant, tp: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **SHAPE,
        num_query_groups=variant.groups,
        tensor_model_parallel_size=tp,
        normalization="RMSNorm",
        layernorm_epsilon=EPSILON,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.1,
        qk_layernorm=variant.normed,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=variant.normed),
        vocab_size=PADDED,
        max_sequence_length=LONGEST,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=variant.tied,
        **variant.gpt,
    )
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that are not all ones, so that no two could be swapped unseen
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    return model


def _save(state: dict[str, Any], variant: Variant, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnBackend

    if variant.args is not None:
        state = {**state, "args": Namespace(**variant.args, attention_backend=AttnBackend.auto), "iteration": 7}
    folder.mkdir(exist_ok=True)
    dist_checkpointing.save(state, str(folder))


def _save_with_masters(variant: Variant, tp: int, folder: Path) -> Any:
    """Save bf16 weights and the state of Megatron's distributed optimizer after a step; the model of its masters."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = _model(variant, tp).bfloat16()
    model.config.bf16, model.config.params_dtype = True, torch.bfloat16
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    parallel = DistributedDataParallel(model.config, buffers, model)
    settings = OptimizerConfig(lr=LR, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [parallel])
    _call(model, tokens()[:, 1:]).mean().backward()
    parallel.start_grad_sync()
    parallel.finish_grad_sync()
    optimizer.step()
    layout = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = model.sharded_state_dict(metadata=layout)
    _save({**state, "optimizer": optimizer.sharded_state_dict(state, metadata=layout)}, variant, folder)
    masters = _model(variant, tp)
    with torch.no_grad():
        for ours, rounded in zip(masters.parameters(), model.parameters(), strict=True):
            ours.copy_(rounded.main_param.view(ours.shape))
    return masters


def _call(model: Any, labels: Tensor | None) -> Tensor:
    inputs = tokens()[:, :-1]
    positions = torch.arange(SEQUENCE).expand_as(inputs)
    future = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    result: Tensor = model(inputs, positions, future, labels=labels)
    return result


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """[batch, sequence, padded vocabulary], of all ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    gathered: Tensor = gather_from_tensor_model_parallel_region(_call(model, None))
    return gathered


def _losses(model: Any) -> list[float]:
    """The mean losses of one batch before each of the first steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _call(model, tokens()[:, 1:]).mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:  # as finalize_model_grads does: ranks have other heads
                dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(loss.item())
    return losses
