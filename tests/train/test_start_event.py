"""What the events of a run say of when, and a start of what it runs."""

from __future__ import annotations

import time
from pathlib import Path

from tests.launching import arguments, events, pretrain


def test_every_event_has_its_time_and_a_start_says_what_it_runs(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "parallel.tensor=2", "zero.stage=2")
    began = time.time()
    assert pretrain(2, [*words, "train.stop_after=2"]) == [(0, "")] * 2
    assert pretrain(1, [*words, "parallel.tensor=1", "train.global_batch_size=2"]) == [(0, "")]
    found = events(tmp_path / "run")
    times = [event["time"] for event in found]
    assert times == sorted(times)
    assert began - 0.001 <= times[0] <= times[-1] <= time.time()
    kinds = [event["event"] for event in found]
    assert kinds[0] == "start"
    assert kinds.index("resume") + 1 == len(kinds) - 1 - kinds[::-1].index("start")
    first, second = events(tmp_path / "run", "start")
    del first["time"], second["time"]
    memory = first.pop("predicted_memory_bytes"), second.pop("predicted_memory_bytes")
    assert 0 < memory[0] < memory[1]
    same = {"event": "start", "parameters": 35040, "total_steps": 4, "device": "cpu"}
    assert first == same | {"step": 0, "ranks": 2, "layout": "tp2-zero2-acc2", "tokens_per_step": 128, "restarts": 0}
    assert second == same | {"step": 2, "ranks": 1, "layout": "zero2", "tokens_per_step": 64, "restarts": 1}
