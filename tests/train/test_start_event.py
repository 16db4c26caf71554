"""What the events of a run say of when, a start of what it runs, and what it leaves to collections of garbage."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

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


def test_no_collection_of_garbage_looks_at_what_imports_made(byte_dataset: str, tmp_path: Path) -> None:
    assert pretrain(1, arguments(byte_dataset, tmp_path / "run", "train.stop_after=1"), plant=count_what_is_left) == [
        (0, "")
    ]


def count_what_is_left() -> None:
    """In the first step; the process of this rank was forked from one that had imported all, which is made to count."""
    import megallama.train.loop

    gc.unfreeze()
    train: Any = megallama.train.loop
    original = train.train_step

    def counted(*words: Any) -> Any:
        assert gc.isenabled()
        assert len(gc.get_objects()) < 100_000 < gc.get_freeze_count()
        return original(*words)

    train.train_step = counted
