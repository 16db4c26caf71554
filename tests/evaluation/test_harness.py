"""lm-evaluation-harness as a user starts it, on tasks of three kinds, against a plain loop over the same model."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megallama.errors import UserError
from megallama.evaluation.harness_model import Megallama
from megallama.generation.load import Loaded, load_model
from tests.generation.tiny import without_cache
from tests.launching import Outcome, execute

pytestmark = pytest.mark.peers

END = 256
QUESTIONS = [
    {"question": "document 7 is", "choices": [" about the number 49", " xyz", " about"], "answer": 0},
    {"question": "", "choices": ["document ", "~~~~"], "answer": 0},
    {
        "question": "a context that is longer than the window of the model, and ends in blanks  ",
        "choices": ["a", "b\u00e9"],
        "answer": 1,
    },
]
TEXTS = ["document 3 is about the number 9. " * 5, "short", "exactly as long as the window!!!"]
PROMPTS = ["document 5 is", "", "number 100. document 10 is about the number 100. doc"]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["m"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": QUESTIONS,
        "rolling": [{"text": text} for text in TEXTS],
        "written": [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS],
    }
    for name, rest in TASKS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
        head = f"task: ours_{name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + rest.lstrip())
    return folder


def lm_eval(tasks: Path, home: Path, arguments: str) -> Outcome:
    command = [sys.executable, "-m", "megallama.evaluation.harness", "--model", "megallama", "--model_args", arguments]
    names = ",".join(f"ours_{name}" for name in TASKS)
    where = ["--tasks", names, "--include_path", str(tasks), "--output_path", str(home / "out"), "--log_samples"]
    return execute([*command, *where], home, HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def answers(home: Path, name: str) -> list[Any]:
    """What the model said to each row of a task, in the order of the rows."""
    (file,) = (home / "out").rglob(f"samples_ours_{name}_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [[said[0] for said in row["resps"]] for row in rows]


def results(home: Path) -> dict[str, dict[str, float]]:
    (file,) = (home / "out").rglob("results_*.json")
    found: dict[str, dict[str, float]] = json.loads(file.read_text())["results"]
    return found


@torch.no_grad()
def plain(model: Loaded, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One token at a time, each behind what is left of all before it."""
    window, total, likeliest = model.config.max_position_embeddings, 0.0, True
    ids = [*context, *continuation][-window - 1 :]
    for place in range(len(ids) - len(continuation), len(ids)):
        logits = model.model(torch.tensor([ids[:place]]))[0, -1]
        total += float(logits.log_softmax(-1)[ids[place]])
        likeliest &= int(logits.argmax()) == ids[place]
    return total, likeliest


def expected_rolling(model: Loaded, text: str) -> float:
    """In the windows of lm_eval's own `hf`."""
    cut = get_rolling_token_windows([*text.encode()], END, model.config.max_position_embeddings, context_len=1)
    return sum(plain(model, *make_disjoint_window(window))[0] for window in cut)


@pytest.fixture(scope="module")
def asked(short_run: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    outcome = lm_eval(tasks, home, f"run={short_run},dtype=fp32,batch_size=2")
    assert outcome.code == 0, outcome.err
    assert "ours_choice" in outcome.out
    return home


def test_choices_have_the_probabilities_of_a_plain_loop(short_run: Path, asked: Path) -> None:
    model = load_model(short_run)
    ended = set()
    for question, said in zip(QUESTIONS, answers(asked, "choice"), strict=True):
        context = str(question["question"])
        for choice, (logprob, greedy) in zip(question["choices"], said, strict=True):
            ids = context.rstrip().encode()
            behind = (context[len(context.rstrip()) :] + choice).encode()
            expected, likeliest = plain(model, [*ids] or [END], [*behind])
            assert float(logprob) == pytest.approx(expected, abs=1e-4)
            assert (str(greedy) == "True") is likeliest
            ended.add(likeliest)
    assert ended == {True, False}, "the questions must tell greedy from not"


def test_rolling_text_has_the_perplexity_of_a_plain_loop(short_run: Path, asked: Path) -> None:
    model = load_model(short_run)
    assert max(map(len, TEXTS)) > 2 * model.config.max_position_embeddings
    expected = [expected_rolling(model, text) for text in TEXTS]
    assert [float(said[0]) for said in answers(asked, "rolling")] == pytest.approx(expected, abs=1e-4)
    bits = -sum(expected) / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert results(asked)["ours_rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)


def test_written_text_is_that_of_a_plain_loop_up_to_the_stop_string(short_run: Path, asked: Path) -> None:
    model = load_model(short_run)
    for prompt, (said,) in zip(PROMPTS, answers(asked, "written"), strict=True):
        ids = without_cache(model, [*prompt.encode()] or [END], 12)
        text = bytes(ids[: [*ids, END].index(END)]).decode(errors="replace")
        assert said == text.partition("m")[0], prompt


def test_a_run_that_is_not_there_ends_in_one_sentence(tasks: Path, tmp_path: Path) -> None:
    outcome = lm_eval(tasks, tmp_path, "run=nowhere")
    sentence = "nowhere is not a folder; give a run directory such as runs/quickstart"
    assert outcome.code == 2
    assert [said.startswith(f"megallama: {sentence}") for said in outcome.sentences] == [True]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "--model_args names no run; give run=RUN, a run, a checkpoint or a Hugging Face folder"),
        (
            {"run": 1, "pretrained": "y"},
            "--model_args pretrained= is not known; use run, device, dtype, batch_size, average",
        ),
        ({"run": 1, "batch_size": "auto"}, "--batch_size auto is not known; give a number such as 8"),
        ({"run": 1, "device": "tpu"}, "--device tpu is not known; use auto, cpu or cuda"),
    ],
)
def test_arguments_that_are_not_known_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        Megallama.create_from_arg_obj(arguments, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})


def test_what_has_no_score_or_no_meaning_here_is_refused(short_run: Path) -> None:
    model = Megallama(short_run)
    window = model.max_length
    for continuation, count in (("", 0), ("a" * (window + 1), window + 1)):
        with pytest.raises(UserError, match=f"has {count} tokens of its own, and must have 1 to {window}"):
            model.loglikelihood([request("loglikelihood", "context", continuation)])
    with pytest.raises(UserError, match="the generation argument num_beams is not known"):
        model.generate_until([request("generate_until", "a", {"num_beams": 4})])
    without = {"num_beams": 1, "top_k": 0, "temperature": 1.0, "do_sample": False, "max_gen_toks": 4}
    plainly = [request("generate_until", "a", each) for each in ({"max_gen_toks": 4}, without)]
    assert len(set(model.generate_until(plainly))) == 1


def test_what_is_asked_for_again_is_drawn_again(short_run: Path) -> None:
    model = Megallama(short_run, batch_size=4)
    draw = request("generate_until", "document ", {"temperature": 1.5, "do_sample": True, "max_gen_toks": 8})
    torch.manual_seed(7)
    texts = model.generate_until([draw] * 4)
    assert len(set(texts)) == 4
    assert model.generate_until([draw] * 4) == texts


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
