"""Text from a trained run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megallama.checkpoint.reading.store import load_weights
from megallama.cli import app
from megallama.errors import UserError
from megallama.generation.generate import generate, write
from megallama.generation.load import Loaded, load_model
from megallama.generation.sampling import Sampling
from tests.generation.tiny import loaded, together
from tests.launching import BIN, Outcome, execute

GREEDY = Sampling(temperature=0.0)
PROMPT = "document 7 is"


@pytest.fixture(scope="module")
def run(short_run: Path) -> Iterator[Loaded]:
    found = load_model(short_run)
    assert (found.name, found.source.name) == ("run", "step_00000040")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on a model this small
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def greedy(run: Loaded) -> str:
    return generate(run, PROMPT, 24, GREEDY)


def test_greedy_text_begins_with_the_prompt_and_is_the_same_every_time(run: Loaded, greedy: str) -> None:
    assert greedy.startswith(PROMPT)
    assert len(greedy) > len(PROMPT)
    assert generate(run, PROMPT, 24, Sampling(temperature=0.0, seed=99)) == greedy


def test_a_seed_fixes_the_text_and_another_changes_it(run: Loaded) -> None:
    texts = [generate(run, PROMPT, 24, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)],
    ids=["top_k 1", "tiny top_p", "tiny temperature"],
)
def test_draws_with_one_candidate_equal_greedy(run: Loaded, greedy: str, sampling: Sampling) -> None:
    assert generate(run, PROMPT, 24, sampling) == greedy


def test_a_prompt_beyond_ascii_survives(run: Loaded) -> None:
    prompt = "naïve 日本語 🙂\n\t"
    assert generate(run, prompt, 3, GREEDY).startswith(prompt)


def test_an_empty_prompt_begins_a_document(run: Loaded) -> None:
    assert generate(run, "", 20, GREEDY)


def test_text_grows_past_the_longest_sequence(run: Loaded) -> None:
    longest = run.config.max_position_embeddings
    text = generate(run, PROMPT, 2 * longest, GREEDY)
    assert len(text.encode()) > longest, "or the document ended early and this shows nothing"
    assert len(generate(run, "x" * 3 * longest, 5, GREEDY)) > 3 * longest


def test_the_last_token_of_a_document_ends_the_text(run: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([104, 105, run.tokenizer.eod_id, 33])
    monkeypatch.setattr("megallama.generation.sampling.pick", lambda *_: torch.tensor(next(draws)))
    assert generate(run, "oh ", 40, GREEDY) == "oh hi"


def test_the_command_prints_what_the_function_returns(run: Loaded, short_run: Path, tmp_path: Path) -> None:
    prompt = "naïve 日本 🙂"
    words = [str(short_run), "--prompt", prompt, "--max-tokens", "12", "--top-k", "5", "--top-p", "0.9", "--seed", "7"]
    outcome = command(tmp_path, *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == generate(run, prompt, 12, Sampling(top_k=5, top_p=0.9, seed=7)) + "\n"


def test_the_model_is_that_of_the_checkpoint(short_run: Path, tmp_path: Path, run: Loaded, greedy: str) -> None:
    """Also where the configuration has since been changed for another run."""
    shutil.copytree(short_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "num_hidden_layers: 2" in text
    config.write_text(text.replace("num_hidden_layers: 2", "num_hidden_layers: 1"))
    assert generate(load_model(tmp_path / "run"), PROMPT, 24, GREEDY) == greedy


def command(home: Path, *words: str) -> Outcome:
    return execute([str(BIN / "megallama"), "generate", *words], home)


def test_the_command_writes_several_samples_up_to_a_stop_string(run: Loaded, short_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("document 7")
    words = ["--prompt-file", str(tmp_path / "prompt"), "--max-tokens", "20", "--samples", "2", "--seed", "3"]
    more = ["--min-p", "0.1", "--repetition-penalty", "1.1", "--stop", "e", "--stop", "no such"]
    outcome = command(tmp_path, str(short_run), *words, *more)
    assert (outcome.code, outcome.err) == (0, "")
    expected = ""
    for number in (0, 1):
        sampling = Sampling(seed=3 + number, min_p=0.1, repetition_penalty=1.1)
        text = generate(run, "document 7", 20, sampling).removeprefix("document 7")
        expected += f"--- sample {number + 1}, seed {3 + number}\ndocument 7{text.partition('e')[0]}\n"
    assert outcome.out == expected


def test_a_checkpoint_writes_as_its_run(short_run: Path, greedy: str) -> None:
    assert generate(load_model(short_run / "checkpoints" / "step_00000040"), PROMPT, 24, GREEDY) == greedy


def test_an_exported_model_writes_as_its_run_and_after_what_its_tokenizer_puts_first(
    short_run: Path, greedy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert CliRunner().invoke(app, ["export", str(short_run), str(folder), "--dtype", "fp32"]).exit_code == 0
    exported = load_model(folder)
    assert (exported.name, exported.prefix, exported.ends) == ("out", (), {256})
    assert generate(exported, PROMPT, 24, GREEDY) == greedy
    rules = json.loads((folder / "tokenizer.json").read_text())
    end = next(token["content"] for token in rules["added_tokens"] if token["id"] == 256)
    first, text = {"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {end: {"id": end, "ids": [256], "tokens": [end]}}
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(rules | {"post_processor": template}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    found = load_model(folder)
    assert (found.encode("a"), found.encode(""), found.ends) == ([256, 97], [256], {3, 4, 256})


def test_the_weights_are_those_of_the_checkpoint_in_either_type(run: Loaded) -> None:
    weights = load_weights(run.source)
    half = load_model(run.source, dtype="bf16").model
    for name, pieces in run.model.shard_slices.items():
        for piece in pieces:
            assert torch.equal(piece.of(run.model.get_parameter(name)), weights[piece.name]), name
            assert torch.equal(piece.of(half.get_parameter(name)), weights[piece.name].bfloat16()), name


def test_bf16_writes_text(run: Loaded) -> None:
    assert len(generate(load_model(run.source, dtype="bf16"), PROMPT, 24, GREEDY)) > len(PROMPT)


def test_a_lone_surrogate_is_written_as_what_the_model_read(run: Loaded) -> None:
    texts = [generate(run, prompt, 8, GREEDY) for prompt in ("a\ud800b", "a\ufffdb")]
    assert texts[0] == texts[1]
    assert list(write(run, ["a"], 8, GREEDY, stop=["\ud800"]))


def test_logits_that_are_not_finite_end_the_text_with_a_sentence() -> None:
    model = loaded(**{"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(UserError, match="the logits of tiny are not finite after this text"):
        generate(model, "a", 4, GREEDY)


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn() -> None:
    """Of 300 ids in the vocabulary the tokenizer of bytes knows 257: here the others are by far the likeliest."""
    head = torch.zeros(300, 32)
    head[257:] = 1e3 * torch.randn(43, 32, generator=torch.Generator().manual_seed(0))
    model = loaded(**{"lm_head.weight": head})
    assert model.model(torch.tensor([[1]]))[0, -1].argmax() >= 257
    for sampling in (GREEDY, Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, min_p=0.5)):
        assert max(together(model, [[1]], 40, sampling)[0]) < 257, sampling


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file are both given; leave one out"),
        (["--prompt-file", "nowhere"], "--prompt-file nowhere cannot be read as UTF-8"),
        (["--device", "tpu"], "--device tpu is not known; use auto, cpu or cuda"),
        (["--dtype", "fp8"], "--dtype fp8 is not known; use auto, fp32 or bf16"),
    ],
)
def test_what_the_command_refuses(words: list[str], sentence: str, short_run: Path) -> None:
    """Every UserError ends a command in one sentence and exit code 2."""
    outcome = CliRunner().invoke(app, ["generate", str(short_run), *words])
    assert isinstance(outcome.exception, UserError)
    assert str(outcome.exception).startswith(sentence)
    assert outcome.output == ""
