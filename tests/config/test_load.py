"""Loading: precedence, exact reload, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megallama.config.json_schema import json_schema
from megallama.config.keys import LEGAL_KEYS, LISTS
from megallama.config.load import LARGEST_FILE, dump_config, load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError

SMALLEST = """\
model: {vocab_size: 100, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
data: {path: corpus}
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train: {seed: 1, micro_batch_size: 2}\n")
    config = load_config(path, ["train.seed=5", "train.seed=7"])
    assert (config.train.seed, config.train.micro_batch_size, config.train.dtype) == (7, 2, "bf16")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.betas=[9e-1,0.9]", "optimizer.betas", (0.9, 0.9)),
        ("train.stop_after=null", "train.stop_after", None),
        ("train.compile=true", "train.compile", True),
        ("train.steps=chinchilla", "train.steps", "chinchilla"),
        ("run.dir=runs/a=b", "run.dir", "runs/a=b"),
        ("model.rope_scaling={rope_type: linear, factor: 2}", "model.rope_scaling.factor", 2.0),
        ("logging.wandb.project=p", "logging.wandb.mode", "online"),
        ("train=null", "train.seed", 1234),
        ("train.tokens=1B", "train.steps", None),
        ("evaluation.sets.web-2=data/web", "evaluation.sets", {"web-2": "data/web"}),
        ("evaluation.sets={'no': a}", "evaluation.sets", {"no": "a"}),
    ],
)
def test_override_values_are_yaml(smallest: Path, override: str, key: str, value: object) -> None:
    found: object = load_config(smallest, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_every_way_to_write_a_rate_is_the_same_number(tmp_path: Path, number: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + f"optimizer: {{lr: {number}}}\n")
    assert load_config(path).optimizer.lr == 3e-4


def test_a_dumped_run_is_complete_and_reloads_to_an_equal_object(smallest: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.lr=3e-4", "model.rope_scaling={rope_type: llama3, factor: 8}", "logging.wandb={project: p}"]
    config = load_config(smallest, [*overrides, "run.dir='null'", "data.tokenizer='1e5'"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert set(yaml.safe_load(dump_config(config))) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("3T", 3 * 10**12),
        ("300b", 3 * 10**11),
        ("1.5e9", 1_500_000_000),
        ("3e12", 3 * 10**12),
        ("3.0e+12", 3 * 10**12),
        ("20_000_000", 20_000_000),
        ("20M", 20_000_000),
        ("'2_000K'", 2_000_000),
        ("2.3T", 2_300_000_000_000),  # as a product of floats it is none whole
        ("0.001K", 1),
        ("999999999999999999", 10**18 - 1),
    ],
)
def test_every_way_to_write_tokens_is_the_same_whole_number(smallest: Path, text: str, tokens: int) -> None:
    by_override = load_config(smallest, [f"train.tokens={text}"])
    assert by_override.train.tokens == tokens
    smallest.write_text(SMALLEST + f"train: {{tokens: {text}}}\n")
    assert load_config(smallest) == by_override
    smallest.write_text(dump_config(by_override))
    assert load_config(smallest) == by_override, "what a run directory holds"


def test_a_length_in_the_file_gives_way_to_one_of_the_other_kind_where_it_is_set_to_null(tmp_path: Path) -> None:
    for in_file, other, null in (
        ("steps: 100", "train.tokens=1B", "train.steps=null"),
        ("tokens: 1B", "train.steps=100", "train.tokens=null"),
    ):
        path = tmp_path / "run.yaml"
        path.write_text(SMALLEST + f"train: {{{in_file}}}\n")
        with pytest.raises(UserError, match=f"both say how long the run is; .*{null}"):
            load_config(path, [other])
        load_config(path, [other, null])


def test_an_empty_section_is_a_section_of_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train:\n  # steps: 3\n")
    assert load_config(path).train.steps == "chinchilla"


# Override, what the sentence must name, and an override that follows its advice.
BAD_OVERRIDES = [
    ("train.micro_batchsize=3", "unknown key train.micro_batchsize; did you mean train.micro_batch_size?",
     "train.micro_batch_size=3"),
    ("train.lr=1e-3", "unknown key train.lr; did you mean optimizer.lr?", "optimizer.lr=1e-3"),
    ("trian.steps=3", "unknown key trian.steps; did you mean train.steps?", "train.steps=3"),
    ("--train.steps=3", "unknown key --train.steps; did you mean train.steps?", "train.steps=3"),
    ("every=3", "did you mean evaluation.every, checkpoint.every or logging.every?", "evaluation.every=3"),
    ("train.foo=3", "unknown key train.foo; legal in train: steps, ", "train.steps=3"),
    ("foo.bar=3", "unknown key foo.bar; legal sections: run, ", "train.steps=3"),
    ("train={micro_batch: 3}", "unknown key train.micro_batch; did you mean train.micro_batch_size?",
     "train={micro_batch_size: 3}"),
    ("train.steps.x=3", "unknown key train.steps.x; ", "train.steps=3"),
    ("train.steps", "train.steps is not KEY=VALUE; write it as train.steps=VALUE", "train.steps=3"),
    ("=3", "write it as train.steps=VALUE", "train.steps=3"),
    ("train.steps=abc", "train.steps=abc is not legal; expected a whole number or chinchilla",
     "train.steps=chinchilla"),
    ("train.steps=1e5", "train.steps=1e5 is not legal; expected a whole number or chinchilla; write 100000",
     "train.steps=100000"),
    ("train.steps=0", "train.steps=0 is not legal; expected at least 1 or chinchilla", "train.steps=1"),
    ("train.tokens=many", "train.tokens=many is not legal; expected a whole number of tokens up to 1e18, such as 300B",
     "train.tokens=300B"),
    ("train.tokens=3TB", "train.tokens=3TB is not legal; expected a whole number of tokens up to 1e18, such as 300B, "
     "1.5e9 or 3T", "train.tokens=3T"),
    ("train.tokens=B", "train.tokens=B is not legal; expected a whole number of tokens", "train.tokens=1B"),
    ("train.tokens=2.0005K", "train.tokens=2.0005K is not legal; expected a whole number of tokens, at least 1; "
     "write 2000",
     "train.tokens=2000"),
    ("train.tokens=0.5", "train.tokens=0.5 is not legal; expected a whole number of tokens, at least 1; write 1",
     "train.tokens=1"),
    ("train.tokens=0", "train.tokens=0 is not legal; expected at least 1", "train.tokens=1"),
    ("train.tokens=-3T", "train.tokens=-3T is not legal; expected a whole number of tokens, at least 1; write 1",
     "train.tokens=3T"),
    ("train.tokens=.inf", "train.tokens=Infinity is not legal; expected a whole number of tokens up to 1e18",
     "train.tokens=1e18"),
    ("train.tokens=nan", "train.tokens=nan is not legal; expected a whole number of tokens up to 1e18",
     "train.tokens=1e18"),
    ("train.tokens=1e999999999999", "train.tokens=1e999999999999 is not legal; expected a whole number of tokens up to "
     "1e18", "train.tokens=1e18"),
    ("train.tokens=1000001T", "train.tokens=1000001T is not legal; expected a whole number of tokens up to 1e18",
     "train.tokens=1000000T"),
    ("train.tokens=true", "train.tokens=true is not legal; expected a whole number", "train.tokens=1"),
    ("train.tokens=[3T]", 'train.tokens=["3T"] is not legal; expected a whole number', "train.tokens=3T"),
    ("train={steps: 100, tokens: 1B}", "train.steps=100 and train.tokens=1000000000 both say how long the run is; "
     "leave one of them out, or set one to null: train.steps=null or train.tokens=null",
     "train={steps: null, tokens: 1B}"),
    ("train={steps: chinchilla, tokens: 1B}", "train.steps=chinchilla and train.tokens=1000000000 both say how long",
     "train={steps: chinchilla, tokens: null}"),
    ("train.steps=null", "train.steps=null and train.tokens=null say no length; use train.steps=chinchilla, or "
     "train.tokens=300B", "train.tokens=300B"),
    ("train.seed=true", "train.seed=true is not legal; expected a whole number", "train.seed=1"),
    ("train.seed='3'", 'train.seed="3" is not legal; expected a whole number; write 3', "train.seed=3"),
    ("train.dtype=fp16", "train.dtype=fp16 is not legal; expected bf16 or fp32; did you mean bf16?",
     "train.dtype=bf16"),
    ("train.recompute=true", "train.recompute=true is not legal; expected none, selective, full or offload",
     "train.recompute=full"),
    ("train.compile=1", "train.compile=1 is not legal; expected auto or true or false", "train.compile=true"),
    ("zero.stage=9", "zero.stage=9 is not legal; expected at most 3", "zero.stage=3"),
    ("run.dir=7", 'run.dir=7 is not legal; expected text; write it in quotes, "7"', 'run.dir="7"'),
    ("optimizer.lr=fast", "optimizer.lr=fast is not legal; expected a number", "optimizer.lr=3e-4"),
    ("optimizer.lr=-1", "optimizer.lr=-1 is not legal; expected more than 0", "optimizer.lr=1"),
    ("optimizer.lr=.nan", "optimizer.lr=NaN is not legal; expected a finite number", "optimizer.lr=1"),
    ("optimizer.lr=nan", "optimizer.lr=NaN is not legal; expected a finite number", "optimizer.lr=1"),
    ("optimizer.z_loss=-1e-4", "optimizer.z_loss=-0.0001 is not legal; expected at least 0", "optimizer.z_loss=1e-4"),
    ("optimizer.z_loss=.inf", "optimizer.z_loss=Infinity is not legal; expected a finite number", "optimizer.z_loss=0"),
    ("optimizer.z_loss=nan", "optimizer.z_loss=NaN is not legal; expected a finite number", "optimizer.z_loss=0"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9 is not legal; expected a list of two numbers such as [0.9, 0.95]",
     "optimizer.betas=[0.9, 0.95]"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] is not legal; expected a list of two numbers",
     "optimizer.betas=[0.9, 0.95]"),
    ("optimizer.betas=[1, 2, 3]", "expected a list of two numbers", "optimizer.betas=[0.9, 0.95]"),
    ("optimizer.betas=[0.9, 1.5]", "optimizer.betas=1.5 is not legal; expected less than 1",
     "optimizer.betas=[0.9, 0.95]"),
    ("parallel.layers_per_stage=balancd", "parallel.layers_per_stage=balancd is not legal; expected a list of whole "
     "numbers such as [8, 9, 9, 6] or balanced or even; did you mean balanced?", "parallel.layers_per_stage=balanced"),
    ("parallel.layers_per_stage=8", "parallel.layers_per_stage=8 is not legal; expected a list of whole numbers such "
     "as [8, 9, 9, 6] or balanced or even", "parallel.layers_per_stage=[8, 9, 9, 6]"),
    ("train=5", "train=5 is not legal; expected a mapping of keys", "train={steps: 5}"),
    ("model.rope_scaling.factor=4", "model.rope_scaling.rope_type is missing; ",
     "model.rope_scaling={rope_type: linear, factor: 4}"),
    ("data.path=null", "data.path is missing; write it in the file or give data.path=VALUE, or several datasets as "
     "data.mixture", "data.path=corpus"),
    ("data.mixture=[{path: a, weight: 1}]", "data.path=", "data.mixture=null"),
    ("data.mixture=[{path: a, weight: 1}, {from_step: 3, sources: []}]", "data.mixture[1] is one of several sources or "
     "stages, and from_step is no key of those", "data.mixture=null"),
    ("data.mixture=[{path: a, weight: 1, name: ''}]", "data.mixture[0].name= is not legal; expected text",
     "data.mixture=null"),
    ("data.path=a: b: c", "data.path=a: b: c, line 1, column 5: ", "data.path=corpus"),
    ("run.dir=&a [*a]", "the alias *a is not read here; write the value out", "run.dir=a"),
    ("train={seed: 1, seed: 2}", "the key seed is given twice; keep one", "train={seed: 1}"),
    ("evaluation.sets.a.b=x", """unlike 'a.b'""", "evaluation.sets.a_b=x"),
    ("evaluation.sets.train=x", 'evaluation.sets={"train": "x"} is not legal; expected names of 1 to 64 letters, '
     "digits, _ and -, and neither train nor validation, unlike 'train'", "evaluation.sets.Train=x"),
    ("evaluation.sets={validation: x}", "unlike 'validation'", "evaluation.sets={held-out: x}"),
    (f"evaluation.sets.{'x' * 65}=x", "unlike 'xxx", f"evaluation.sets.{'x' * 64}=x"),
    ("evaluation.sets.=x", "unlike ''", "evaluation.sets.x=x"),
    ("evaluation.sets.é=x", "unlike 'é'", "evaluation.sets.e=x"),
    ("evaluation.sets.web=3", 'evaluation.sets.web=3 is not legal; expected text; write it in quotes, "3"',
     'evaluation.sets.web="3"'),
    ("evaluation.sets.web={a: x}", 'evaluation.sets.web={"a": "x"} is not legal; expected text',
     "evaluation.sets={web: x}"),
    ("evaluation.sets=data/web", "evaluation.sets=data/web is not legal; expected a mapping of names to datasets such "
     "as {web: data/web}", "evaluation.sets={web: data/web}"),
    ("evaluation.sets={no: x}", "YAML takes a name in evaluation.sets for the value false; write it in quotes",
     "evaluation.sets={'no': x}"),
    ("evaluation.set.web=x", "unknown key evaluation.set.web; ", "evaluation.sets.web=x"),
    ("model.import=nothing.json", "there is no file ", "train.steps=3"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "sentence", "good"), BAD_OVERRIDES, ids=[row[0] for row in BAD_OVERRIDES])
def test_a_bad_override_gets_one_sentence_whose_advice_loads(
    smallest: Path, bad: str, sentence: str, good: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(smallest, [bad])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    load_config(smallest, [good])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty; a run needs at least model and data"),
        ("- a\n- b\n", "is a list at its top level; expected sections such as model: and data:"),
        ("just text", "is a str at its top level"),
        ("model: {}\nmodel: {}\n", "line 2, column 1: the key model is given twice; keep one"),
        ("train: {seed: 1, seed: 2}\n", "the key seed is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2, column 4: the alias *x is not read here"),
        ("model: [\n", "line 2, column 1: "),
        (
            "model: !!python/object:os.system {}\n",
            "the tag tag:yaml.org,2002:python/object:os.system is not read here",
        ),
        ("x: " + "[" * 20000, "line 1, column 23: more than 20 levels, which no run has"),
        ("trian: {steps: 3}\n", "unknown key trian; did you mean train?"),
        ("lr: 3\n", "unknown key lr; did you mean optimizer.lr?"),
        ("1: 3\n", "unknown key 1; legal sections"),
        ("data: {path: x}\n", "model.vocab_size is missing; "),
        ("model: 3\n", "model=3 is not legal; expected a mapping of keys"),
        (SMALLEST + "train: {seed: {2020-01-01: 1}}\n", "train.seed={} is not legal; expected a whole number"),
        (SMALLEST + "train: {dtype: 2020-01-01}\n", "train.dtype=2020-01-01 is not legal; expected bf16 or fp32"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_config(path)
    path.write_text("#" * (LARGEST_FILE + 1))
    with pytest.raises(UserError, match="is larger than 1048576 bytes"):
        load_config(path)
    path.write_text("model: \x07")
    with pytest.raises(UserError, match="not legal YAML"):
        load_config(path)


def test_a_missing_file_is_answered_with_the_nearest(smallest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*runn\.yaml; did you mean .*run\.yaml\?"):
        load_config(tmp_path / "runn.yaml")
    with pytest.raises(UserError, match=r"is a directory; did you mean .*run\.yaml\?"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*; "):
        load_config(tmp_path / "nowhere" / "deep.json")


def test_the_schema_knows_every_key_and_the_import() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    leaves = {name for part in [schema, *schema["$defs"].values()] for name in part["properties"]}
    assert {key.rpartition(".")[2] for key in LEGAL_KEYS}.union(*LISTS.values()) == leaves
    undocumented = [
        n for part in schema["$defs"].values() for n, f in part["properties"].items() if not f["description"]
    ]
    assert not undocumented
