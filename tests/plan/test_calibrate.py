"""From a run's own steps to the constant that later plans use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from megallama.config.load import dump_config, load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import built_in_hardware, find_gpu, load_hardware
from megallama.layout.budget import with_batch
from megallama.plan.calibrate import (
    LEAST_EVENTS,
    MeasuredStep,
    calibrate,
    fitted_efficiency,
    read_run,
)
from megallama.plan.cli import plan
from megallama.plan.time.software import machine
from megallama.plan.time.step_time import step_time
from megallama.run_dir.steady import steady_seconds
from tests.launching import arguments, pretrain

CONFIG = Path(__file__).parents[2] / "configs" / "7b.yaml"
H100 = "NVIDIA H100 80GB HBM3"
app = typer.Typer()
app.command()(plan)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user without a hardware file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def train_events(seconds: dict[int, float]) -> list[dict[str, Any]]:
    return [{"event": "train", "step": step, "seconds": value} for step, value in seconds.items()]


def made_run(folder: Path, seconds: float, device: str = H100, dtype: str = "bf16", steps: int = 12) -> Path:
    """What a run of 7b on 128 ranks leaves behind, whose steps took so long."""
    folder.mkdir()
    config = load_config(CONFIG, [f"train.dtype={dtype}", "logging.every=1"])
    (folder / "config.yaml").write_text(dump_config(config))
    facts = {"device": device, "threads": 1, "topology": {"pp": 4, "dp": 16, "cp": 1, "tp": 2}}
    (folder / "environment.json").write_text(json.dumps(facts))
    events = train_events({step: seconds if step > 3 else 100.0 for step in range(1, steps + 1)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_plan_with_the_new_default_gives_the_measured_step_time(tmp_path: Path, home: Path) -> None:
    (part,) = calibrate(made_run(tmp_path / "run", 20.0))
    gpu = find_gpu("h100")
    assert list(gpu.efficiency) == ["calibrated", "pytorch-2024", "mosaic-2023"], "it is the default, and none is lost"
    assert step_time(load_config(CONFIG), 128, machine(gpu)).total == pytest.approx(20.0, rel=1e-3)
    assert {row.key: row.value for row in part.rows}["efficiency"] == gpu.efficiency["calibrated"]
    assert str(home / ".config" / "megallama" / "hardware.yaml") in part.note


def test_steps_of_a_ramp_are_fitted_by_the_batch_that_they_had(tmp_path: Path, home: Path) -> None:
    """As long as the plan says at an efficiency of 0.5: for the batch of the ramp, which is half of the last one."""
    run, batch = made_run(tmp_path / "run", 20.0), 512
    ramp = f"train.batch_ramp=[{{global_batch_size: {batch}, until: 100000000000}}]"
    config = load_config(run / "config.yaml", [ramp])
    (run / "config.yaml").write_text(dump_config(config))
    seconds = step_time(with_batch(config, batch), 128, replace(machine(find_gpu("h100")), efficiency=0.5)).total
    events = [event | {"global_batch_size": 256} for event in train_events(dict.fromkeys(range(1, 9), 1.0))]
    events += [event | {"global_batch_size": batch} for event in train_events(dict.fromkeys(range(9, 20), seconds))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    calibrate(run)
    assert find_gpu("h100").efficiency["calibrated"] == pytest.approx(0.5, rel=1e-3)


def test_what_the_file_has_already_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "# my cluster\nh100-80g: {nic_gb_s: 25, efficiency: {mine: 0.5, calibrated: 0.9}}\nmy-card: {power_w: 600}\n"
    file.write_text(text)
    calibrate(made_run(tmp_path / "run", 20.0), file)
    found = yaml.safe_load(file.read_text())
    assert found["my-card"] == {"power_w": 600}
    assert found["h100-80g"]["nic_gb_s"] == 25
    assert list(found["h100-80g"]["efficiency"].items())[1:] == [("mine", 0.5)]
    assert found["h100-80g"]["efficiency"]["calibrated"] != 0.9
    assert (tmp_path / "mine.yaml.bak").read_text() == text, "its comment is not lost"
    predicted = step_time(load_config(CONFIG), 128, machine(load_hardware(file)["h100-80g"])).total
    assert predicted == pytest.approx(20.0, rel=1e-3), "fitted with the network of the file"


def test_a_card_of_ones_own_is_found_by_its_driver_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    entry = {**built_in_hardware()["h100-80g"].model_dump(include={"peak_tflops", "memory_tb_s", "gpus_per_node"})}
    entry |= {"driver_name": "My Card", "node_link_gb_s": 450, "nic_gb_s": 50}
    file.write_text(yaml.safe_dump({"my-card": entry}))
    calibrate(made_run(tmp_path / "run", 20.0, device="Some My Card 2"), file)
    assert list(load_hardware(file)["my-card"].efficiency) == ["calibrated"]


def test_a_cpu_is_measured_and_a_plan_gives_its_step_time(
    byte_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured for real but for the link, for which ranks have to start."""
    monkeypatch.setattr("megallama.hardware.measure.run_ranks", lambda *_: [1e9, 2e9])
    larger = ["model.hidden_size=128", "model.intermediate_size=512", "train.steps=14", "evaluation.every=0"]
    words = arguments(byte_dataset, tmp_path / "run", *larger, "checkpoint.every=0")
    assert pretrain(1, words) == [(0, "")]
    file = tmp_path / "mine.yaml"
    (part,) = calibrate(tmp_path / "run", file)
    measured = {row.key: row.value for row in part.rows}["seconds"]
    cpu = load_hardware(file)["cpu"]
    assert list(cpu.efficiency) == ["calibrated"]
    assert cpu.kind == "cpu"
    for figure in ("peak_tflops", "memory_tb_s", "memory_gib", "gpus_per_node"):
        assert cpu.known(figure) > 0
    run = read_run(tmp_path / "run")
    there = run.environment
    assert (there.device, there.threads, there.world_size) == ("cpu", 1, 1)
    assert step_time(run.config, 1, machine(cpu)).total == pytest.approx(measured, rel=1e-2)


def test_steps_that_settle_or_share_the_machine_with_a_save_are_left_out() -> None:
    events = train_events({step: float(step) for step in range(1, 7)})
    saved = [{"event": "checkpoint", "step": 5}]
    assert steady_seconds(events, 1) == [4, 5, 6]
    more = train_events({step: float(step) for step in range(7, 10)})
    assert steady_seconds([*events, *saved, *more], 1) == [4, 5, 8, 9]


def test_only_the_last_start_counts() -> None:
    events = train_events({step: 1.0 for step in range(1, 11)})
    again = [{"event": "resume", "step": 10}, *train_events({step: 2.0 for step in range(11, 16)})]
    assert steady_seconds([*events, *again], 1) == [2.0, 2.0]


def test_a_mean_over_a_step_that_settles_is_left_out() -> None:
    assert steady_seconds(train_events({10: 9.0, 20: 1.0, 30: 2.0}), 10) == [1.0, 2.0]


def test_a_line_that_was_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", 20.0)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "train", "st\xff')
    assert read_run(run).step_seconds == 20.0


def test_runs_that_give_no_constant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--calibrate=.*none is no run, for it has no config\.yaml; give"):
        calibrate(tmp_path / "none")
    few = made_run(tmp_path / "few", 20.0, steps=LEAST_EVENTS + 2)
    with pytest.raises(UserError, match=r"has 4 train events of steady steps, and 5 are needed; train 9 steps"):
        calibrate(few)
    with pytest.raises(UserError, match=r"ran on NVIDIA H900, which no GPU that is known is called by its driver"):
        calibrate(made_run(tmp_path / "unknown", 20.0, device="NVIDIA H900"))
    with pytest.raises(UserError, match=r"^train\.dtype=fp32 has no step time on h100-80g"):
        calibrate(made_run(tmp_path / "fp32", 20.0, dtype="fp32"))
    with pytest.raises(UserError, match=r"^steps of 1e-05 s fit no efficiency from 0\.001 to 1"):
        calibrate(made_run(tmp_path / "fast", 1e-5))
    run = made_run(tmp_path / "old", 20.0)
    (run / "environment.json").write_text('{"device": "cpu", "topology": {}}')
    with pytest.raises(
        UserError, match=r"environment\.json is not what a run of this version writes \(topology: Dictionary should"
    ):
        calibrate(run)


OLD = "environment.json is not what a run of this version writes "


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[1]", f"{OLD}(Input should be an object); train again"),
        (b'{"topology": 3, "device": "cpu", "threads": 1}', f"{OLD}(topology: Input should be an object); train again"),
        (
            b'{"topology": {"tp": "2"}, "device": "cpu", "threads": 1}',
            f"{OLD}(topology.tp: Input should be a valid integer); train again",
        ),
        (
            b'{"topology": {"tp": 2}, "device": 7, "threads": 1}',
            f"{OLD}(device: Input should be a valid string); train again",
        ),
        (
            b'{"topology": {"tp": 2}, "device": "cpu", "threads": 0}',
            f"{OLD}(threads: Input should be greater than or equal to 1); train again",
        ),
        (b"\xff", f"{OLD}(Invalid JSON: expected value at line 1 column 1); train again"),
    ],
)
def test_an_environment_that_no_run_wrote_is_one_sentence(
    content: bytes, sentence: str, tmp_path: Path, home: Path
) -> None:
    run = made_run(tmp_path / "run", 20.0)
    (run / "environment.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        calibrate(run)
    assert str(refused.value) == f"{run}/{sentence}"
    assert not home.exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"garbage", "is no event of a run; take the line out, or train again"),
        (b"[]", "is no event of a run; take"),
        (b"3", "is no event of a run; take"),
        (b"{}", "is no event of a run; take"),
        (b'{"event": "straggler", "rank": [3]}', "is no event of a run; take"),
        (b"", "is no event of a run; take"),
        (b'{"event": "\xff"}', "is no event of a run; take"),
        (b"[" * 100_000, "is no event of a run; take"),
        (b'{"event": "train", "seconds": 1.0}', "is a train event whose step is None, not a whole number; take"),
        (b'{"event": "resume", "step": "4"}', "is a resume event whose step is 4, not a whole number; take"),
        (b'{"event": "train", "step": 13}', "is a train event whose seconds are None, not a number above 0; take"),
        *(
            (b'{"event": "train", "step": 13, "seconds": %s}' % text, "is a train event whose seconds are ")
            for text in (b"null", b"0", b"-1.0", b"NaN", b"Infinity", b'"1"', b"true")
        ),
    ],
    ids=lambda case: case[:40] if isinstance(case, bytes) else "",
)
def test_a_line_that_no_run_wrote_is_one_sentence(line: bytes, sentence: str, tmp_path: Path, home: Path) -> None:
    run = made_run(tmp_path / "run", 20.0)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError) as refused:
        calibrate(run)
    assert str(refused.value).startswith(f"{run}/metrics.jsonl, line 13, {sentence}")
    assert not home.exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = made_run(tmp_path / "run", 20.0)
    with pytest.raises(UserError, match=r"cannot be written \(.*: Not a directory\); choose another --hardware$"):
        calibrate(run, tmp_path / "file" / "hardware.yaml")


def test_the_command_prints_what_it_did_and_refuses_what_would_plan_another_run(tmp_path: Path) -> None:
    run, file = made_run(tmp_path / "run", 20.0), tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["--calibrate", str(run), "--hardware", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    assert "Calibration of h100-80g" in result.stdout
    assert "median of 9 train events" in result.stdout
    assert f"Written to {file} as h100-80g.efficiency.calibrated" in result.stdout
    for more in ([str(CONFIG)], ["--tokens", "2T"]):
        refused = CliRunner().invoke(app, [*more, "--calibrate", str(run)])
        assert isinstance(refused.exception, UserError)
        assert "leave one of them out" in str(refused.exception)


CARD = built_in_hardware()["h100-80g"]
RUN = load_config(CONFIG)


def taken(config: RunConfig, efficiency: float) -> MeasuredStep:
    """What a step takes where that is predicted."""
    on = machine(CARD)
    seconds = step_time(config, 128, replace(on, efficiency=efficiency)).total
    return MeasuredStep(config, 128, CARD, on.software, seconds)


@pytest.mark.parametrize("efficiency", [0.01, 0.4, 0.99])
def test_a_predicted_step_gives_its_constant_back(efficiency: float) -> None:
    assert fitted_efficiency([taken(RUN, efficiency)]) == pytest.approx(efficiency, abs=1e-8)


def test_steps_that_disagree_are_missed_by_the_same_share_on_average() -> None:
    steps = [taken(RUN, 0.4), taken(load_config(CONFIG, ["train.global_batch_size=2048"]), 0.6)]
    on = replace(machine(CARD), efficiency=fitted_efficiency(steps))
    slow, fast = (step_time(step.config, 128, on).total / step.seconds for step in steps)
    assert slow < 1 < fast
    assert slow * fast == pytest.approx(1)


@pytest.mark.parametrize("seconds", [1e-3, 1e6])
def test_seconds_that_no_constant_gives_are_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"^steps of 0?\.?[\de+]+ s fit no efficiency from 0\.001 to 1; check"):
        fitted_efficiency([replace(taken(RUN, 0.5), seconds=seconds)])
