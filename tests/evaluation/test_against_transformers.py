"""The perplexity of an exported model, by transformers and a loop of their guide's, beside `megallama eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megallama.cli import app

pytestmark = pytest.mark.peers
WINDOW, STRIDE = 64, 24
TEXT = "document 8 is about the number 64. document 9 is about naïve numbers, 日本語 and more. " * 20


def test_perplexity_is_that_of_transformers(short_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run = CliRunner().invoke(app, ["export", str(short_run), str(tmp_path / "model"), "--dtype", "fp32"])
    assert run.exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    nats, counted, end = 0.0, 0, 0
    while end < len(ids) - 1:
        before, end = end, min(len(ids) - 1, end + (STRIDE if end else WINDOW))
        begin = max(0, end - WINDOW)
        seen = torch.tensor([ids[begin : end + 1]])
        labels = seen.clone()
        labels[:, : before - begin + 1] = -100
        with torch.inference_mode():
            nats += float(model(seen, labels=labels).loss) * (end - before)
        counted += end - before
    theirs = math.exp(nats / counted)
    for path in (short_run, tmp_path / "model"):
        words = ["eval", str(path), str(tmp_path / "text.txt"), "--stride", str(STRIDE), "--json"]
        found = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
        assert (found["tokens"], found["window"]) == (counted, WINDOW)
        assert found["perplexity"] == pytest.approx(theirs, rel=1e-3)
