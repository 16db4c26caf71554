"""A mixture reads its sources by weight, the same at every layout and after every start; unfit ones are refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.indexed import bin_path
from megallama.data.loader import open_data
from megallama.data.mapped import mapped
from megallama.data.mixture import Mixture, open_mixture, open_train
from megallama.data.plan import plan_data, step_of, table
from megallama.data.sampler import Sampler
from megallama.data.source import open_source
from megallama.data.trace import parse_steps, trace
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen, stage_samples
from megallama.layout.topology import Topology
from tests.launching import ROOT

Write = Callable[..., str]
WEIGHTS = {"web": 0.6, "books": 0.25, "code": 0.15}
EOD = 256


@pytest.fixture
def paths(write_dataset: Write) -> dict[str, str]:
    """Every document of a source begins with ids of its own: 0, 50 or 100, and the number of the document."""
    sizes = {"web": 60, "books": 20, "code": 10}
    return {
        name: write_dataset(name, [[50 * kind, number, *range(7), EOD] for number in range(sizes[name])])
        for kind, name in enumerate(WEIGHTS)
    }


def config_of(mixture: Any, steps: int = 20, batch: int = 4, **data: Any) -> RunConfig:
    tree = load_config(ROOT / "configs" / "debug.yaml").model_dump()
    tree["data"] = {"mixture": mixture, "sequence_length": 9, "validation_fraction": 0.2, **data}
    tree["train"] |= {"steps": steps, "global_batch_size": batch, "micro_batch_size": 1}
    return RunConfig.model_validate(tree)


def sources(paths: dict[str, str], **weights: float) -> list[dict[str, Any]]:
    return [{"path": paths[name], "weight": weight} for name, weight in (weights or WEIGHTS).items()]


def read_over(mixture: Mixture, samples: range) -> list[tuple[int, ...]]:
    return [tuple(mixture.sample(number).tolist()) for number in samples]


def test_each_source_is_read_by_weight_and_each_of_its_windows_once_an_epoch(paths: dict[str, str]) -> None:
    mixture = open_mixture(config_of(sources(paths))).train
    seen: dict[str, Counter[int]] = {name: Counter() for name in WEIGHTS}
    for number in range(400):
        name, place = mixture.trace(number)
        assert (
            place.epoch == sum(seen[name].values()) // mixture.parts[mixture.blend.names.index(name)].samples_per_epoch
        )
        seen[name][place.unit] += 1
        row = mixture.sample(number)
        assert place.document == (place.unit * 9) // 10
        stream = np.array([[50 * [*WEIGHTS].index(name), d, *range(7), EOD] for d in range(60)]).ravel()
        assert row.tolist() == stream[place.unit * 9 :][:10].tolist()
    assert {name: sum(counts.values()) for name, counts in seen.items()} == {"web": 240, "books": 100, "code": 60}
    for counts in seen.values():
        assert max(counts.values()) - min(counts.values()) <= 1


def test_ranks_share_a_step_and_a_position_says_everything(paths: dict[str, str]) -> None:
    config = config_of(sources(paths))
    whole = read_over(open_mixture(config).train, range(36, 40))
    for dp in (1, 2, 4):
        ranks = [open_data(config, Topology(dp=dp), rank).train.step(36) for rank in range(dp)]
        tokens = torch.cat([batch.tokens for micro in zip(*ranks, strict=True) for batch in micro])
        assert [row[:-1] for row in whole] == [tuple(row) for row in tokens.tolist()]


def test_sources_go_on_in_the_next_stage(paths: dict[str, str]) -> None:
    stages = [
        {"from_step": 0, "sources": sources(paths, web=0.5, books=0.5)},
        {"from_step": 5, "sources": sources(paths, code=0.5, web=0.5)},
    ]
    mixture = open_mixture(config_of(stages)).train
    places = [mixture.trace(number) for number in range(40)]
    assert Counter(name for name, _ in places[:20]) == {"web": 10, "books": 10}
    assert Counter(name for name, _ in places[20:]) == {"web": 10, "code": 10}
    web = mixture.parts[mixture.blend.names.index("web")]
    assert [place for name, place in places if name == "web"] == [web.trace(number) for number in range(20)]


def test_stages_that_have_begun_stay_where_they_began_and_others_follow_the_batches(paths: dict[str, str]) -> None:
    config = config_of([{"from_step": step, "sources": sources(paths)} for step in (0, 5, 9)], batch=8)
    assert stage_samples(config) == (0, 40, 72)
    # Seven steps of 4 samples were done, and the run goes on with 8.
    seen = Seen(7, 28, 4, (0, 20))
    assert stage_samples(config, seen) == (0, 20, 28 + 2 * 8)
    data = open_data(config, Topology(), 0).begun_at(stage_samples(config, seen))
    assert isinstance(data.train.source, Mixture)
    assert [stage.first_sample for stage in data.train.source.blend.stages] == [0, 20, 44]


def test_stages_follow_a_batch_that_grows(paths: dict[str, str]) -> None:
    config = config_of([{"from_step": step, "sources": sources(paths)} for step in (0, 5, 9)], batch=8)
    ramp = {"batch_ramp": [{"global_batch_size": 2, "until": 9 * 10}, {"global_batch_size": 4, "until": 9 * 20}]}
    config = RunConfig.model_validate(config.model_dump() | {"train": config.train.model_dump() | ramp})
    # Five steps of 2 samples, three of 4, and 8 from there on.
    assert stage_samples(config) == (0, 10, 22 + 8)
    mixture = open_train(config)
    lines = [*trace(config, mixture, (1, 10), 2)]
    assert [sum(each.step == step for each in lines) for step in range(1, 11)] == [2] * 5 + [4] * 3 + [8] * 2
    assert [each.sample for each in lines] == [*range(38)]
    assert step_of(config, 9) == 5
    assert [step_of(config, sample) for sample in (10, 21, 22, 37, 38)] == [6, 8, 9, 10, 11]
    assert [step_of(config, sample, Seen(6, 14, 2, (0, 10))) for sample in (0, 13, 14, 22)] == [1, 6, 7, 9]


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    def order(name: str) -> list[int]:
        return [Sampler(1000, 7, name).window(number) for number in range(100)]

    assert len({tuple(order(name)) for name in ("", "web", "books")}) == 3


def test_the_identity_covers_what_was_read_and_not_what_comes_later(paths: dict[str, str]) -> None:
    def fingerprint(begun: int, *stages: tuple[int, dict[str, float]]) -> str:
        tree = [{"from_step": begins, "sources": sources(paths, **weights)} for begins, weights in stages]
        return open_mixture(config_of(tree)).train.fingerprint(9, begun)

    first, later, other = (0, {"web": 1.0, "books": 1.0}), (5, {"web": 1.0}), (5, {"code": 1.0})
    assert fingerprint(1, first) == fingerprint(1, first, later) == fingerprint(1, first, other)
    assert len({fingerprint(2, first), fingerprint(2, first, later), fingerprint(2, first, other)}) == 3
    assert fingerprint(1, first) != fingerprint(1, (0, {"web": 2.0, "books": 1.0}))
    assert fingerprint(1, first) == fingerprint(1, (0, {"books": 2.0, "web": 2.0}))
    assert fingerprint(2, first, later) != fingerprint(2, first, (4, later[1]))


def test_the_tail_of_each_source_is_held_out(paths: dict[str, str]) -> None:
    data = open_data(config_of(sources(paths)), Topology(), 0)
    assert [*data.evaluated] == ["train", "validation", "validation/web", "validation/books", "validation/code"]
    assert data.validation is not None
    blend = data.validation.source
    assert isinstance(blend, Mixture)
    assert Counter(blend.trace(number)[0] for number in range(20)) == {"web": 12, "books": 5, "code": 3}
    for kind, name in enumerate(WEIGHTS):
        rows = [data.sets[f"validation/{name}"].source.sample(number) for number in range(2)]
        first = {"web": 48, "books": 16, "code": 8}[name]
        assert rows[0].tolist() == [50 * kind, first, *range(7), EOD]
    # books has 4 documents held out, 4 windows of 9: its fifth sample would come again, at 17 in the blend or later.
    assert blend.samples_per_epoch == min(blend.blend.number(0, 4) or 0, blend.blend.number(1, 2) or 0)
    batches = [*data.validation.evaluation(1000)]
    assert len(batches) == blend.samples_per_epoch
    assert not (batches[-1].labels == IGNORE_INDEX).all()
    alone = open_data(config_of(sources(paths, web=1)), Topology(), 0)
    assert [*alone.evaluated] == ["train", "validation"]
    path = open_data(config_of(sources(paths), validation_path=paths["code"]), Topology(), 0)
    assert [*path.evaluated] == ["train", "validation"]
    assert path.train.source.parts[0].split.end_document == 20  # books: nothing is held out


@pytest.mark.parametrize("keys", [{"pack": "one"}, {"eod_mask_loss": True}])
def test_what_a_dataset_alone_is_read_as_it_is_read_as_in_a_mixture(
    paths: dict[str, str], keys: dict[str, Any]
) -> None:
    mixture = open_data(config_of(sources(paths, web=1.0), **keys), Topology(), 0).train
    alone = config_of(None, path=paths["web"], **keys)
    source = open_source(alone.data, "validation", alone.train.seed, 257)
    held_out = open_data(config_of(sources(paths, web=1.0), **keys), Topology(), 0).validation
    assert held_out is not None
    assert held_out.source.sample(3).tolist() == source.sample(3).tolist()
    assert mixture.source.masked_id == source.masked_id


def test_unfit_sources_are_refused_in_a_sentence(paths: dict[str, str], write_dataset: Write) -> None:
    short = write_dataset("short", [[1, 2], [3, EOD]])
    for found, sentence in (
        ([*sources(paths), {"path": short, "weight": 1}], r"source short: data\.sequence_length=9 is longer than "),
        ([*sources(paths), {"path": "nowhere", "weight": 1}], r"source nowhere: nowhere\.idx does not exist"),
        ([{"path": write_dataset("n", [[1] * 99]), "weight": 1}], r"source n: .*n holds 1 document, too few to keep"),
        ([{"path": write_dataset("big", [[900] * 99] * 9), "weight": 1}], "source big: .*does not cover the id 900"),
    ):
        with pytest.raises(UserError, match=rf"data\.mixture, {sentence}"):
            open_data(config_of(found), Topology(), 0)


def test_a_limit_of_epochs_is_refused_with_the_largest_weight_that_fits(paths: dict[str, str]) -> None:
    def opened(weight: float, epochs: float | None, seen: Seen = NOTHING_SEEN) -> None:
        limited = {"path": paths["code"], "weight": weight, "epochs": epochs}
        open_data(config_of([*sources(paths, web=0.6, books=0.4), limited], 30), Topology(), 0, seen)

    with pytest.raises(UserError) as refused:  # 8 documents of 10 tokens: 8 windows of 9
        opened(1.0, 2)
    words = "data.mixture reads code for 7.50 epochs in this run, more than its epochs=2; use weight="
    assert str(refused.value).startswith(words)
    fitting = float(str(refused.value).removeprefix(words).split()[0])
    opened(fitting, 2)
    assert fitting == pytest.approx(16 / 104, rel=0.01)
    opened(1.0, 7.5)
    opened(1.0, None)
    with pytest.raises(UserError, match=r"more than its epochs=1e-06; use epochs=7\.5"):
        opened(1.0, 1e-6)
    with pytest.raises(UserError, match="use less weight for it in stages that have not begun, or epochs="):
        opened(1.0, 2, seen=Seen(1, 4, 4, (0,)))  # its weight is that of samples that were read
    with pytest.raises(UserError, match=r"more than its epochs=1; use epochs=1\.36"):  # alone: no weight would do
        open_data(config_of([{"path": paths["web"], "weight": 1, "epochs": 1}], 18), Topology(), 0)


def test_a_plan_counts_what_the_run_will_read(paths: dict[str, str]) -> None:
    stages = [
        {"from_step": 0, "sources": sources(paths)},
        {"from_step": 15, "sources": sources(paths, code=0.7, web=0.3)},
    ]
    config = config_of(stages, steps=40)
    mixture = open_train(config)
    plan = plan_data(config, mixture)
    places = [mixture.trace(number) for number in range(160)]
    for source in plan.sources:
        own = [number for number, (name, _) in enumerate(places) if name == source.name]
        assert source.read_samples == len(own)
        again = [number for number in own if places[number][1].epoch == 1]
        assert source.repeats_at_step == (again[0] // 4 + 1 if again else None)
        assert source.left_out_tokens == source.tokens - 1 - source.samples * config.data.sequence_length
    assert [source.name for source in plan.sources] == [*WEIGHTS]
    assert [source.verdict.partition(",")[0] for source in plan.sources] == ["repeats", "all new", "over 4 epochs"]
    assert plan.stages[1].shares == {"code": "7/10", "web": "3/10"}
    one = config_of(stages, steps=40, pack="one", sequence_length=4)
    said = list(table(plan_data(one, open_train(one))))
    assert "web: no sample of an epoch holds 288 tokens; documents cut: 48" in said


def test_a_trace_is_what_the_ranks_read(paths: dict[str, str]) -> None:
    config = config_of(sources(paths), batch=8)
    mixture = open_train(config)
    alone, two = [*trace(config, mixture, (3, 4))], [*trace(config, mixture, (3, 4), 2)]
    assert [(a.step, a.sample, a.source, a.window) for a in alone] == [
        (b.step, b.sample, b.source, b.window) for b in two
    ]
    for rank in range(2):
        rows = torch.cat([batch.tokens for batch in open_data(config, Topology(dp=2), rank).train.step(16)]).tolist()
        mine = [mixture.sample(each.sample).tolist()[:-1] for each in two if each.step == 3 and each.rank == rank]
        assert rows == mine
    assert parse_steps("3") == (3, 3)
    for words in ("0:3", "4:3", "a:b", ""):
        with pytest.raises(UserError, match="is no range of steps"):
            parse_steps(words)
    with pytest.raises(UserError, match="its last step is 20"):
        next(trace(config, mixture, (20, 21)))
    with pytest.raises(UserError, match="is no multiple of"):
        next(trace(config, mixture, (1, 1), 3))
    smaller = Seen(6, 24, 4, (0,))  # six steps of 4 samples, before the config had 8
    assert next(trace(config, mixture, (7, 7), seen=smaller)).sample == 24
    with pytest.raises(UserError, match="read 24 sequences, not the 48 of this config; use --steps 7 or later"):
        next(trace(config, mixture, (6, 6), seen=smaller))


def test_commands_plan_and_trace_without_torch(paths: dict[str, str], tmp_path: Path) -> None:
    words = [f"data.mixture={json.dumps(sources(paths))}", "data.path=null", "data.sequence_length=9"]
    words += ["data.validation_fraction=0.2", "train.steps=9", f"run.dir={tmp_path / 'run'}"]
    code = (
        "import json, sys; from megallama.cli import app\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    try: app(command)\n"
        "    except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    asked = [
        ["plan"],
        ["trace", "--steps", "2:3", "--dp", "2"],
        ["trace", "--steps", "2:3", "--dp", "2", "--dp-rank=1"],
    ]
    commands = [["data", *each, "configs/debug.yaml", *words, "--json"] for each in asked]
    call = [sys.executable, "-c", code, json.dumps(commands)]
    out = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    plan, *lines = map(json.loads, out.splitlines())
    assert [source["name"] for source in plan["sources"]] == [*WEIGHTS]
    both, second = lines[:16], lines[16:]
    assert second == [each for each in both if each["rank"] == 1] != []
    assert not (tmp_path / "run").exists()


def test_a_mapped_file_holds_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "ids.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes() + b"x")
    before = len(os.listdir("/proc/self/fd"))
    arrays = [mapped(tmp_path / "ids.bin", np.dtype("<u2")) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    part = arrays[7][3:6]
    del arrays
    assert part.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1
    assert Path("/proc/self/maps").read_text().count("ids.bin") == 1
    del part
    assert Path("/proc/self/maps").read_text().count("ids.bin") == 0


def test_many_sources_open_with_few_files(write_dataset: Write) -> None:
    paths = [write_dataset(f"d{number}", [[number % 250] * 12, [7] * 12]) for number in range(80)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        mixture = open_mixture(config_of([{"path": path, "weight": 1} for path in paths], validation_fraction=0)).train
        assert {mixture.trace(number)[0] for number in range(10**9, 10**9 + 80)} == {Path(p).name for p in paths}
        mixture.sample(10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert bin_path(paths[0]).exists()
