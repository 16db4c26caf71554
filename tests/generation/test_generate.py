"""Text from a trained run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megallama.data.tokenizer import Tokenizer
from megallama.generation.generate import Sampling, generate, load_run, pick
from megallama.model.llama import Llama
from tests.launching import BIN, execute

GREEDY = Sampling(temperature=0.0)
PROMPT = "document 7 is"

Run = tuple[Llama, Tokenizer]


@pytest.fixture(scope="module")
def run(short_run: Path) -> Iterator[Run]:
    model, tokenizer, checkpoint = load_run(short_run)
    assert checkpoint.name == "step_00000040"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on a model this small
    yield model, tokenizer
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def greedy(run: Run) -> str:
    return generate(*run, PROMPT, 24, GREEDY)


def test_greedy_text_begins_with_the_prompt_and_is_the_same_every_time(run: Run, greedy: str) -> None:
    assert greedy.startswith(PROMPT)
    assert len(greedy) > len(PROMPT)
    assert generate(*run, PROMPT, 24, Sampling(temperature=0.0, seed=99)) == greedy


def test_a_seed_fixes_the_text_and_another_changes_it(run: Run) -> None:
    texts = [generate(*run, PROMPT, 24, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)],
    ids=["top_k 1", "tiny top_p", "tiny temperature"],
)
def test_draws_with_one_candidate_equal_greedy(run: Run, greedy: str, sampling: Sampling) -> None:
    assert generate(*run, PROMPT, 24, sampling) == greedy


def test_a_prompt_beyond_ascii_survives(run: Run) -> None:
    prompt = "naïve 日本語 🙂\n\t"
    assert generate(*run, prompt, 3, GREEDY).startswith(prompt)


def test_an_empty_prompt_begins_a_document(run: Run) -> None:
    assert generate(*run, "", 20, GREEDY)


def test_text_grows_past_the_longest_sequence(run: Run) -> None:
    longest = run[0].config.max_position_embeddings
    text = generate(*run, PROMPT, 2 * longest, GREEDY)
    assert len(text.encode()) > longest, "or the document ended early and this shows nothing"
    assert len(generate(*run, "x" * 3 * longest, 5, GREEDY)) > 3 * longest


def test_the_last_token_of_a_document_ends_the_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([104, 105, run[1].eod_id, 33])
    monkeypatch.setattr("megallama.generation.generate.pick", lambda *_: next(draws))
    assert generate(*run, "oh ", 40, GREEDY) == "oh hi"


def test_the_command_prints_what_the_function_returns(run: Run, short_run: Path, tmp_path: Path) -> None:
    prompt = "naïve 日本 🙂"
    words = [str(short_run), "--prompt", prompt, "--max-tokens", "12", "--top-k", "5", "--top-p", "0.9", "--seed", "7"]
    outcome = execute([str(BIN / "megallama"), "generate", *words], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == generate(*run, prompt, 12, Sampling(top_k=5, top_p=0.9, seed=7)) + "\n"


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


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.0), Sampling(temperature=1e-39)], ids=["top_p 0", "1e-39"])
def test_the_smallest_values_that_the_command_takes_equal_greedy(sampling: Sampling) -> None:
    assert set(draws(PROBABILITIES.log(), sampling, 10)) == {3}


def draws(logits: Tensor, sampling: Sampling, times: int) -> list[int]:
    randomness = torch.Generator().manual_seed(sampling.seed)
    return [pick(logits, sampling, randomness) for _ in range(times)]


def test_the_model_is_that_of_the_checkpoint(short_run: Path, tmp_path: Path, run: Run, greedy: str) -> None:
    """Also where the configuration has since been changed for another run."""
    shutil.copytree(short_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "num_hidden_layers: 2" in text
    config.write_text(text.replace("num_hidden_layers: 2", "num_hidden_layers: 1"))
    model, tokenizer, _ = load_run(tmp_path / "run")
    assert generate(model, tokenizer, PROMPT, 24, GREEDY) == greedy
