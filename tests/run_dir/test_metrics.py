"""What a run says reaches the disk sooner or later, and ends no run."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.run_dir.events import METRICS, JsonLines, read_events

SCRIPT = """
import resource, sys
from pathlib import Path
from megallama.run_dir.events import JsonLines

sink = JsonLines(Path(sys.argv[1]))
before = resource.getrlimit(resource.RLIMIT_FSIZE)
sink.write({"event": "train", "step": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
for step in range(1, 2000):
    sink.write({"event": "train", "step": step})
resource.setrlimit(resource.RLIMIT_FSIZE, before)
sink.write({"event": "train", "step": 2000})
sink.close()
"""


def test_lines_that_a_full_disk_refused_follow_when_there_is_room(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(2001))
    waits = "; the run goes on, and they wait in memory for room"
    assert done.stderr == f"megallama: metrics cannot be written (File too large){waits}\n"


@pytest.mark.parametrize(
    ("lines", "starts"),
    [
        ([], 0),
        (["start", "train"], 1),
        (["start", "train", "start", "resume", "start"], 3),
        (["train"], 1),
        (["train", "resume", "train"], 2),
        (["train", "resume", "train", "resume", "start"], 3),
    ],
)
def test_starts_are_counted_also_where_earlier_versions_wrote_none(
    lines: list[str], starts: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"event": line, "step": 0}) + "\n" for line in lines))
    assert JsonLines(path).starts == starts


def test_numbers_that_are_not_finite_are_null_wherever_they_are(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / METRICS)
    nowhere = {"loss": math.inf, "activation_rms": [1.0, math.nan], "by": {"a": -math.inf}}
    lines.write({"event": "layers", "step": 1, **nowhere})
    lines.close()
    (event,) = read_events(tmp_path / METRICS)
    assert event == {"event": "layers", "step": 1, "loss": None, "activation_rms": [1.0, None], "by": {"a": None}}
