"""Which tokens are drawn, how often, and what their draws depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from megallama.generation.generate import write
from megallama.generation.sampling import Sampler, Sampling, pick
from tests.generation.tiny import loaded, together

# Of six tokens the likeliest are 3, 1 and 4; probabilities as they fall: 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125.
PROBABILITIES = torch.tensor([0.03125, 0.25, 0.0625, 0.5, 0.125, 0.03125])


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        (Sampling(1.0), {0, 1, 2, 3, 4, 5}),
        (Sampling(1.0, top_k=3), {3, 1, 4}),
        (Sampling(1.0, top_k=100), {0, 1, 2, 3, 4, 5}),
        (Sampling(1.0, top_p=0.7), {3, 1}),
        (Sampling(1.0, top_p=0.8), {3, 1, 4}),
        (Sampling(1.0, top_p=1.0), {0, 1, 2, 3, 4, 5}),
        (Sampling(1.0, top_k=2, top_p=0.8), {3, 1}),
        (Sampling(1.0, top_k=3, top_p=0.1), {3}),
        (Sampling(1.0, min_p=0.25), {3, 1, 4}),
        (Sampling(1.0, min_p=0.26), {3, 1}),
        (Sampling(1.0, min_p=1.0), {3}),
        (Sampling(1.0, min_p=0.0), {0, 1, 2, 3, 4, 5}),
        (Sampling(1.0, top_k=4, min_p=0.5), {3, 1}),
        (Sampling(0.0, top_k=3), {3}),
    ],
    ids=str,
)
def test_only_the_likeliest_are_drawn_and_each_of_them_is(sampling: Sampling, drawn: set[int]) -> None:
    assert set(draws(PROBABILITIES.log(), sampling, 600)) == drawn


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = PROBABILITIES.log() + 3.0
    found = torch.bincount(torch.tensor(draws(logits, Sampling(temperature), 4000)), minlength=6) / 4000
    torch.testing.assert_close(found, (logits / temperature).softmax(dim=-1), atol=0.03, rtol=0.0)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_p=0.0), Sampling(temperature=1e-39), Sampling(temperature=1e-60)],
    ids=["top_p 0", "1e-39", "1e-60"],
)
def test_the_smallest_values_that_the_command_takes_equal_greedy(sampling: Sampling) -> None:
    assert set(draws(PROBABILITIES.log(), sampling, 10)) == {3}


def draws(logits: Tensor, sampling: Sampling, times: int) -> list[int]:
    randomness = torch.Generator().manual_seed(sampling.seed)
    return [int(pick(logits, sampling, randomness)) for _ in range(times)]


def test_a_text_does_not_depend_on_what_else_is_in_the_batch() -> None:
    model, sampling = loaded(), Sampling(1.0, seed=7)
    prompts = [[1, 2, 3], [4], [5] * 40]
    alone = [together(model, [prompt], 60, sampling)[0] for prompt in prompts]
    assert together(model, prompts, 60, sampling) == alone
    assert together(model, prompts[::-1], 60, sampling) == alone[::-1]


def test_samples_are_those_of_the_seeds_that_follow() -> None:
    model = loaded()

    def texts(seed: int, samples: int) -> list[str]:
        found = [""] * samples
        for piece in write(model, ["a"], 30, Sampling(1.0, seed=seed), samples=samples, rows=3):
            found[piece.sample] += piece.text
        return found

    five = texts(11, 5)
    assert len(set(five)) == 5
    assert five == [texts(11 + number, 1)[0] for number in range(5)]


def test_a_penalty_holds_for_the_prompt_and_for_what_was_drawn() -> None:
    sampler = Sampler(Sampling(0.0, repetition_penalty=2.0), [0, 3], 4, torch.device("cpu"))
    assert int(sampler.pick(torch.tensor([3.0, 2.0, -1.0, -0.4]))) == 1  # 1.5, 2, -1, -0.8
    assert int(sampler.pick(torch.tensor([2.2, 2.1, -1.0, -0.4]))) == 0  # 1.1, 1.05, -1, -0.8
    assert int(sampler.pick(torch.tensor([-2.0, -2.0, -3.0, -1.6]))) == 2


@pytest.mark.parametrize("seed", range(3))
def test_what_may_be_drawn_is_what_transformers_leaves(seed: int) -> None:
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    held = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34]])
    processors = LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(12),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.05),
        ]
    )
    expected = processors(held, logits.clone())[0].softmax(dim=-1)
    sampling = Sampling(0.7, 12, 0.9, 0, 0.05, 1.3)
    counts = torch.zeros(50)
    for number in range(3000):  # a sampler remembers what it has drawn: each draw is another's first
        counts[Sampler(sampling, held[0].tolist(), 50, torch.device("cpu"), number).pick(logits[0])] += 1
    assert torch.equal(counts > 0, expected > 0)
    torch.testing.assert_close(counts / 3000, expected, atol=0.04, rtol=0.0)
