"""Attention and positions within documents, against a dense mask, and each document against itself alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import megallama.model.llama
from megallama.config.data_keys import DataConfig
from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX, ModelConfig
from megallama.config.train_keys import Objective
from megallama.data.loader import Loader, MicroBatch
from megallama.data.source import open_source
from megallama.model.attention import AttentionCore, FusedAttention, attention_of, flex_attention, positions
from megallama.model.blockwise import blockwise_attention
from megallama.model.init import initialise
from megallama.model.llama import Llama, Recompute, TensorParallelContext
from megallama.parallel.mesh import ALONE

SHAPE = ModelConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DOCUMENTS = torch.tensor([[0] * 7 + [1] + [2] * 24, [0] * 32, [0] * 3 + [1] * 28 + [2]], dtype=torch.int32)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_positions_begin_anew_in_each_document() -> None:
    lengths = [7, 1, 24, 32, 3, 28, 1]
    assert [size for size, _ in FusedAttention(causal=True).stretches(DOCUMENTS)] == lengths
    assert positions(DOCUMENTS).flatten().tolist() == [p for n in lengths for p in range(n)]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_attention_within_documents_is_that_of_a_dense_mask(objective: Objective) -> None:
    q, k, v = random(3, 4, 32, 16, seed=1), random(3, 2, 32, 16, seed=2), random(3, 2, 32, 16, seed=3)
    seen = (DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]) & torch.ones(32, 32).tril().bool()
    if objective == "masked":
        seen = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    found = FusedAttention(causal=objective == "causal").within(DOCUMENTS, 16)(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    target = random(*found.shape, seed=4)
    theirs, mine = (torch.autograd.grad((each * target).sum(), (q, k, v)) for each in (expected, found))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_mask_of_a_gpu_is_the_same(objective: Objective) -> None:
    """Its kernel is compiled; here torch computes what it means, forward only, over several blocks of 128."""
    documents = torch.tensor([[0] * 100 + [1] * 150 + [2] * 50, [0] * 299 + [1]])
    q, k, v = (random(2, heads, 300, 16, seed=heads).detach() for heads in (4, 2, 2))
    core = FusedAttention(causal=objective == "causal")
    found = flex_attention(q, k, v, block_mask=core.block_mask(documents))
    torch.testing.assert_close(found, core.within(documents, 16)(q, k, v), rtol=1e-10, atol=1e-10)


SQUARE, PREFIX = (300, 300), (200, 456)
"""Queries and keys: whole blocks of queries and a rest; the last of more positions."""


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("queries", "keys"), [SQUARE, PREFIX])
def test_attention_in_blocks_is_that_of_the_whole_square(queries: int, keys: int, kv_heads: int) -> None:
    q, target = random(2, 4, queries, 16, seed=1), random(2, 4, queries, 16, seed=2).detach()
    k, v = random(2, kv_heads, keys, 16, seed=3), random(2, kv_heads, keys, 16, seed=4)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = blockwise_attention(q, k, v)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad((each * target).sum(), (q, k, v)) for each in (found, whole))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_blocks_is_one_operator_to_a_compiler(dtype: torch.dtype) -> None:
    """Of the strides, types and gradients that it says."""
    q, k, v = (random(1, heads, 140, 16, seed=heads).detach().to(dtype) for heads in (4, 2, 2))
    torch.library.opcheck(blockwise_attention, tuple(each.requires_grad_() for each in (q, k, v)))


@pytest.mark.parametrize(
    ("overrides", "in_blocks"),
    [
        (["train.compile=true", "data.sequence_length=512"], True),
        (["train.compile=true", "data.sequence_length=1024"], False),
        (["train.compile=true", "data.sequence_length=1024", "train.dtype=bf16"], True),
        (["train.compile=auto", "data.sequence_length=512", "train.dtype=bf16"], False),
        (["train.compile=true", "data.sequence_length=512", "train.objective=masked"], False),
    ],
)
def test_blocks_are_for_runs_that_ask_for_a_compiler_and_gain(overrides: list[str], in_blocks: bool) -> None:
    config = load_config("configs/debug.yaml", ["model.max_position_embeddings=1024", *overrides])
    assert attention_of(config, {"cp": ALONE}).in_blocks == in_blocks


def test_attention_in_blocks_is_as_exact_in_bf16_as_scores_in_bf16_are() -> None:
    """Twice the error of torch's kernel, which keeps its scores in fp32."""
    q, k, v = (random(2, 2, 384, 64, seed=seed).detach().bfloat16() for seed in (1, 2, 3))
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)

    def error(found: Tensor) -> float:
        return float((found - truth).norm() / truth.norm())

    assert error(blockwise_attention(q, k, v)) < 2 * error(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def model(objective: Objective = "causal", recompute: Recompute = "none") -> Llama:
    made = Llama(
        SHAPE, TensorParallelContext(attention=FusedAttention(causal=objective == "causal")), recompute=recompute
    )
    initialise(made, made.shard_slices, seed=7, num_layers=SHAPE.num_hidden_layers, std=0.1)
    return made


def gradients(recompute: Recompute) -> dict[str, Tensor]:
    made = model(recompute=recompute)
    tokens = torch.randint(SHAPE.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    made(tokens[:, :-1], tokens[:, 1:], DOCUMENTS).backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_recomputation_stays_within_documents() -> None:
    plain = gradients("none")
    modes: tuple[Recompute, ...] = ("selective", "full")
    for mode in modes:
        found = gradients(mode)
        assert [name for name, gradient in plain.items() if not torch.equal(found[name], gradient)] == []


def graphs(made: Llama, batches: list[Tensor]) -> list[int]:
    """How many torch's compiler has made after each of the batches; each has the result that it has without."""
    found, tokens = [], torch.randint(SHAPE.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    expected = [made(tokens[:, :-1], tokens[:, 1:], documents).detach() for documents in batches]
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    for layer in made.layers.values():
        layer.compile(backend="aot_eager")
    for documents, loss in zip(batches, expected, strict=True):
        torch.testing.assert_close(made(tokens[:, :-1], tokens[:, 1:], documents).detach(), loss)
        found.append(counters["stats"]["unique_graphs"] - before)
    return found


def test_other_documents_are_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [DOCUMENTS, DOCUMENTS.flip(0), DOCUMENTS.flip(1), torch.arange(32, dtype=torch.int32).expand(3, 32)]
    assert len(set(graphs(model(), batches))) == 1, "one by one"
    flex = cache(lambda: torch.compile(flex_attention, backend="aot_eager"))

    def of_a_gpu(self: FusedAttention, documents: Tensor, head_dim: int) -> AttentionCore:
        return partial(flex(), block_mask=self.block_mask(documents))

    monkeypatch.setattr(FusedAttention, "within", of_a_gpu)
    with torch.no_grad():  # its backward is for GPUs alone
        assert len(set(graphs(model(), batches))) == 1


EOD, LENGTH = 256, 40
LENGTHS = [9, 1, 17, 10]
"""Of documents; with an end before each they fill a window and its last label."""


@pytest.fixture
def packed_and_alone(write_dataset: Callable[..., str]) -> tuple[MicroBatch, list[MicroBatch]]:
    """One sample of four documents that begin behind an end, and each of these in a sample of its own."""
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(EOD, (length,), generator=generator).tolist() for length in LENGTHS]
    together, apart = write_dataset("b", [[EOD, *each] for each in documents]), write_dataset("a", documents)

    (packed,) = samples(1, {"path": together, "document_mask": True})
    return packed, samples(len(documents), {"path": apart, "pack": "one"})


def samples(count: int, keys: dict[str, object]) -> list[MicroBatch]:
    config = DataConfig.model_validate({"sequence_length": LENGTH, "validation_fraction": 0, **keys})
    loader = Loader(open_source(config, "train", 1, EOD + 1), 1, lambda _: 1, document_mask=config.documents_apart)
    return [loader.step(number)[0] for number in range(count)]


def differences(packed: MicroBatch, alone: list[MicroBatch]) -> list[float]:
    """Of the mean loss of each document: in the packed sample, less alone."""
    made, found = model(), []
    for each in alone:
        first = int((packed.tokens[0, 1:] == each.tokens[0, 1]).nonzero()[0])
        counted = each.labels != IGNORE_INDEX
        labels = torch.full_like(packed.labels, IGNORE_INDEX)
        labels[:, first : first + int(counted.sum())] = each.labels[counted]
        assert torch.equal(packed.labels[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX])
        with torch.no_grad():
            losses = made(packed.tokens, labels, packed.documents) - made(each.tokens, each.labels)
        found.append(abs(float(losses)) / int(counted.sum()))
    return found


def test_a_document_has_the_loss_in_a_packed_sample_that_it_has_alone(
    packed_and_alone: tuple[MicroBatch, list[MicroBatch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, alone = packed_and_alone
    assert packed.labels.tolist().count(IGNORE_INDEX) == 0
    assert int((packed.labels == IGNORE_INDEX).sum()) == len(LENGTHS) - 1
    assert len(alone) == len(LENGTHS)
    assert max(differences(packed, alone)) < 1e-5
    assert max(differences(replace(packed, documents=None), alone)) > 0.01
    monkeypatch.setattr(FusedAttention, "within", lambda self, documents, head_dim: self)
    assert max(differences(packed, alone)) > 0.01


def test_the_model_turns_queries_and_keys_by_positions_in_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no loss tells: rotary embedding makes of them their differences."""
    original, seen = megallama.model.llama.rotation, []

    def watched(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(positions)
        return original(positions, frequencies)

    monkeypatch.setattr(megallama.model.llama, "rotation", watched)
    model()(torch.zeros_like(DOCUMENTS, dtype=torch.int64), None, DOCUMENTS)
    assert len(seen) == 1, "once for all layers"
    assert torch.equal(seen[0], positions(DOCUMENTS))


def test_what_fills_up_a_sample_before_its_document_changes_no_loss(write_dataset: Callable[..., str]) -> None:
    path, made = write_dataset("a", [[*range(length)] for length in LENGTHS]), model()
    right, left = (samples(len(LENGTHS), {"path": path, "pack": "one", "pad": pad}) for pad in ("right", "left"))
    with torch.no_grad():
        for behind, before in zip(right, left, strict=True):
            loss = made(behind.tokens, behind.labels)
            torch.testing.assert_close(made(before.tokens, before.labels, before.documents), loss, rtol=1e-5, atol=0)
            assert abs(made(before.tokens, before.labels) / loss - 1) > 1e-3, "tokens see what fills up"
