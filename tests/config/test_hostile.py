"""Configurations that nobody should write: one sentence and exit code 2, or what they say, by each command."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallama.cli import main
from megallama.config.keys import LEGAL_KEYS
from megallama.config.load import dump_config, load_config
from megallama.errors import UserError
from megallama.layout.check import check_config
from megallama.layout.frozen import checkpoint_bytes
from megallama.plan.time.simulation import refuse_long
from megallama.run_dir.limits import check_run_dir
from tests.checkpoint.test_hostile import mutated
from tests.launching import ROOT

EXAMPLES = 300
BASES = [("debug.yaml", 1), ("debug.yaml", 4), ("7b.yaml", 128), ("8b.yaml", 64)]
"""Configurations, each with a number of GPUs on which it is legal."""
FOREIGN = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
META = {"dim": 64, "multiple_of": 32, "ffn_dim_multiplier": 1.5, "n_layers": 2, "n_heads": 4, "vocab_size": 256}
TEXTS = st.sampled_from(
    [
        *("null", "true", "0", "-1", "1e400", ".inf", "-.inf", ".nan", "1e308", "1e-320", "9" * 40, "9" * 5000),
        *("0x1F", "1:30", "2020-01-01", "!!binary aGk=", "!!set {a}", "!!python/name:os.system", "<<", "*a", "&a 1"),
        *("? ", "- ", "[", "{", "]", '"', "'", "#", "%", "\t", "\r\n", "\n\n", "\ufeff", "\0", "\x1b[31m", "\x85"),
        *("\u2028", "\u202e", '"\\ud800"', '"\\0"', '"a\\nb"', "x" * 300, "é" * 200, "[" * 50, "{a: " * 30, "[1, 2]"),
        *("!!timestamp x", "!!bool x", "!!int ''", "0x" + "f" * 5000, "1" + ":1" * 3000, "1" + ":1" * 3000 + ".5"),
        *("{a: 1}", "~", "|", ">", "3T", "1e9", "-5B", "chinchilla", "llama3", "zbvzerobubble", "dualpipev", "auto"),
        *("../..", "/", "parallel.tensor", "model:", "run: {dir: /dev/null/x}", "$(touch PWNED)", "`id`", "%j", "-x"),
    ]
)
OVERRIDES = st.lists(
    st.tuples(st.sampled_from([*LEGAL_KEYS, "model.layers", "trian.steps", "", "."]), TEXTS).map("=".join), max_size=1
)


def run(*words: str) -> tuple[int, str, str]:
    """A command as its user gives it: exit code, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["megallama", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()


def config_text(name: str, data: st.DataObject) -> str:
    """A real configuration with some of its values or of its characters changed."""
    text = (ROOT / "configs" / name).read_text()
    if data.draw(st.booleans()):
        return json.dumps(mutated(yaml.safe_load(text), data, most=2))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.sampled_from((at, at + 1, at + 7, text.find("\n", at) + 1)))
        text = text[:at] + data.draw(TEXTS) + text[max(at, until) :]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=10_000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_a_configuration_says_it_is_legal_or_a_sentence(data: st.DataObject, folder: Path) -> None:
    path, foreign = folder / "run.yaml", folder / "foreign.json"
    base, gpus = data.draw(st.sampled_from(BASES))
    path.write_text(config_text(base, data), encoding="utf-8", errors="surrogatepass", newline="")
    overrides = [word for word in data.draw(OVERRIDES) if "\0" not in word]  # no command line carries a zero byte
    if data.draw(st.integers(0, 9)) == 0:
        foreign.write_text(json.dumps(mutated(data.draw(st.sampled_from((FOREIGN, META))), data)))
        overrides.append("model={import: foreign.json}")
    words = [str(path), *(f"x{word}" if word.startswith("-") else word for word in overrides)]
    command = data.draw(st.sampled_from(("config", "plan", "launch", "train")))
    if command == "train":
        try:
            config = load_config(words[0], words[1:])
            check_config(config, gpus)
            check_run_dir(Path(config.run.dir), checkpoint_bytes(config))
        except UserError as refused:
            assert_one_sentence(f"megallama: {refused}\n")
        return
    more = {"config": [], "plan": [f"--gpus={gpus}", "--gpu=h100"], "launch": ["--dry-run"]}[command]
    code, out, err = run(command, *words, *more)
    assert code in (0, 2), (code, err)
    if code == 2:
        assert_one_sentence(err)
        return
    config = load_config(words[0], words[1:])
    (folder / "dumped.yaml").write_text(dump_config(config))
    assert load_config(folder / "dumped.yaml") == config
    if command == "plan":
        assert not re.search(r"\b(nan|inf)\b", out), out
    if command == "launch":
        comments, code_lines = (
            re.findall(r"^#SBATCH.*$", out, re.MULTILINE),
            re.sub(r"^#.*$", "", out, flags=re.MULTILINE),
        )
        assert len(comments) > 8
        assert "PWNED" not in code_lines.replace("'", "\0'").split("exec bash")[0]


def assert_one_sentence(err: str) -> None:
    assert re.fullmatch(r"megallama: .+\n", err), err
    assert err[:-1].isprintable(), err
    assert len(err) < 12_000
    assert "Traceback" not in err


def test_numbers_that_overflow_in_a_formula_are_refused_or_planned(folder: Path) -> None:
    for word in (f"model.rope_theta={math.nextafter(math.inf, 0)}", "optimizer.eps=5e-324", "optimizer.lr=1e308"):
        code, out, err = run("plan", str(ROOT / "configs" / "7b.yaml"), word, "--gpus=128", "--gpu=h100")
        assert code in (0, 2)
        assert not re.search(r"\b(nan|inf)\b|Traceback", out + err)


@pytest.mark.parametrize("flag", ["--flops", "--params", "--tokens"])
@pytest.mark.parametrize("value", ["1e400", "nan", "inf", "-1", "0", "1e308", "9" * 5000, "\x1b[31m", "1:30"])
def test_hostile_sizes_are_one_sentence(flag: str, value: str) -> None:
    code, _, err = run("plan", f"{flag}={value}")
    assert code == 2, value
    assert_one_sentence(err)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.steps=0x" + "f" * 5000, "a number of 5002 characters; a run has none of more than 100"),
        ("train.steps=1" + ":1" * 3000, "a number of 6001 characters"),
        ("optimizer.lr=1" + ":1" * 3000 + ".5", "a number of 6003 characters"),
        ("train.dtype=!!timestamp x", "the tag tag:yaml.org,2002:timestamp is not read here; leave it out"),
        ("train.compile=!!bool x", "the tag tag:yaml.org,2002:bool is not read here"),
        ("train.steps=!!int ''", "the tag tag:yaml.org,2002:int is not read here"),
    ],
    ids=["hexadecimal", "base 60", "base 60 with a point", "timestamp", "bool", "int"],
)
def test_what_yaml_cannot_build_is_one_sentence(word: str, sentence: str) -> None:
    code, _, err = run("config", str(ROOT / "configs" / "debug.yaml"), word)
    assert code == 2
    assert sentence in err
    assert_one_sentence(err)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(META | {"dim": 1e308}), "has dim=1e+308; expected a number from 1 to 10000000"),
        (json.dumps(META | {"dim": 10**90}), "has dim=1000"),
        (json.dumps(META | {"multiple_of": 1e-320}), "has multiple_of=1e-320; expected a number from 1 to"),
        (json.dumps(META | {"ffn_dim_multiplier": []}), "has ffn_dim_multiplier=[]; expected a number from 0.001 to"),
        (json.dumps(META | {"ffn_dim_multiplier": ""}), "has ffn_dim_multiplier=; expected a number from 0.001 to"),
        (json.dumps(META | {"ffn_dim_multiplier": 1e308}), "has ffn_dim_multiplier=1e+308; expected"),
        (json.dumps(FOREIGN | {"model_type": ["x" * 5000]}), "which is not Llama's; expected model_type=llama"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "model.import=foreign.json: a number of 5000 characters"),
        ('{\n"hidden_size": ' + "[" * 100_000, "model.import=foreign.json, line 2: more than 20 levels"),
        ('{"hidden_size": ' + "[" * 500 + "]" * 500 + "}", "model.import=foreign.json, line 1: more than 20 levels"),
        ('{"hidden_size": "' + "[" * 500 + '"', "model.import=foreign.json: not legal JSON at line 1, column 519"),
    ],
)
def test_an_import_that_overflows_is_one_sentence(content: str, sentence: str, folder: Path) -> None:
    (folder / "foreign.json").write_text(content)
    (folder / "imports.yaml").write_text("model: {import: foreign.json}\ndata: {path: x}\n")
    code, _, err = run("config", str(folder / "imports.yaml"))
    assert code == 2
    assert sentence in err
    assert_one_sentence(err)
    assert len(err) < 300


def test_a_step_too_long_to_draw_is_refused_with_the_longest() -> None:
    config = str(ROOT / "configs" / "7b.yaml")
    code, _, err = run("plan", config, "--gpus=128", "--timeline", "train.global_batch_size=1000000000")
    assert code == 2
    assert_one_sentence(err)
    (longest,) = re.findall(r"too many to draw; nearest legal: train.global_batch_size=(\d+)", err)
    refuse_long(load_config(config), int(longest) // 64)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "zbvzerobubble"])
def test_an_impossible_number_of_micro_batches_is_told_at_once(schedule: str) -> None:
    words = [f"parallel.schedule={schedule}", "train.global_batch_size=1000000000", "train.micro_batch_size=1"]
    words += ["parallel.tensor=1", "model.num_hidden_layers=64", "parallel.pipeline=7"]
    code, _, err = run("config", str(ROOT / "configs" / "7b.yaml"), *words, "--gpus=7")
    if schedule == "interleaved1f1b":
        assert (
            "cannot run over parallel.pipeline=7; nearest legal: train.global_batch_size=999999994 or 1000000001" in err
        )
    else:
        assert code == 0, err


def test_a_pipeline_of_more_stages_than_any_is_refused() -> None:
    config = str(ROOT / "configs" / "7b.yaml")
    deep = ["model.num_hidden_layers=1900", "parallel.tensor=1", "train.global_batch_size=4096"]
    code, _, err = run("plan", config, *deep, "parallel.pipeline=5000", "--gpus=5000")
    assert (code, err) == (2, "megallama: parallel.pipeline=5000 is not legal; expected at most 128\n")
    more = ["parallel.pipeline=64", "parallel.schedule=interleaved1f1b", "parallel.chunks=29"]
    code, _, err = run("plan", config, *deep, *more, "--gpus=64")
    assert code == 2
    assert "= 64 * 29 = 1856 stages are more than 512; nearest legal: parallel.chunks=8" in err


def test_a_sentence_is_short_whatever_it_quotes() -> None:
    config, numbers = str(ROOT / "configs" / "7b.yaml"), list(range(1, 2001))
    for override in (f"parallel.layers_per_stage={numbers}", f"train.{'x' * 3000}=1", f"data.path={numbers}"):
        code, _, err = run("plan", config, override)
        assert code == 2
        assert len(err) < 500


@pytest.mark.parametrize(
    "words", [("generate",), ("checkpoint", "list"), ("checkpoint", "verify"), ("plan", "--calibrate")]
)
def test_a_folder_whose_name_is_too_long_is_one_sentence(words: tuple[str, ...]) -> None:
    code, _, err = run(*words, "x" * 300)
    assert code == 2
    assert re.fullmatch(rf"megallama: {'x' * 300}(/\w+(\.\w+)?)? is too long for the name of a file\n", err)


def test_a_file_that_never_ends_is_no_configuration(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", Path("/dev/zero"), Path("/dev/stdin")):
        code, _, err = run("plan", str(path), "--gpus=8")
        assert (code, err) == (2, f"megallama: {path} cannot be read: it is no regular file; give a readable file\n")


def test_the_end_of_an_override_is_no_comment() -> None:
    """A run would go to another directory without a word."""
    for word in ("run.dir=a #b", "run.dir=#b", "data.path=x # y", "optimizer.lr=1e-3 #"):
        code, _, err = run("config", str(ROOT / "configs" / "debug.yaml"), word)
        assert code == 2
        assert_one_sentence(err)
        assert "YAML reads no further than the #" in err
    assert load_config(ROOT / "configs" / "debug.yaml", ['run.dir="a #b"']).run.dir == "a #b"
    assert load_config(ROOT / "configs" / "debug.yaml", ["run.dir=a#b"]).run.dir == "a#b"


def test_a_name_that_is_too_long_for_a_file_is_one_sentence() -> None:
    for path in ("x" * 300, "x" * 5000):
        code, _, err = run("config", path)
        assert code == 2
        assert_one_sentence(err)


def test_text_without_end_is_refused_at_once(folder: Path) -> None:
    for content, found in {
        "model: [" + "1," * 500_000 + "]": "more than 10,000 values",
        "model: " + "[" * 100_000 + "]" * 100_000: "more than 20 levels",
        "model: " + "{a: " * 100_000: "more than 20 levels",
        "x" * (1 << 20) + "y": "larger than 1048576 bytes",
    }.items():
        (folder / "long.yaml").write_text(content)
        code, _, err = run("config", str(folder / "long.yaml"))
        assert code == 2
        assert found in err
        code, _, err = run("config", str(ROOT / "configs" / "debug.yaml"), f"train={content}")
        assert code == 2
        assert_one_sentence(err)
