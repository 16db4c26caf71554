# Every target does its own set-up in .venv; nothing else on the machine is touched.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
# At a time: one waits for its processes to start while the other computes. What is timed runs alone.
TWO_FILES := --numprocesses 2 --dist loadfile

.PHONY: quickstart bench test test-layouts test-benchmarks test-peers test-faults test-slurm test-mutants check format clean

quickstart: .venv/installed
	$(BIN)/megallama tokenizer train stdlib --output data/quickstart/tokenizer --vocab-size 4096
	$(BIN)/megallama data build stdlib --output data/quickstart/corpus --tokenizer data/quickstart/tokenizer
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --hostfile=/dev/null --num_gpus=1 launch/pretrain.py --config configs/quickstart.yaml
	@echo "--- the model writes:"
	@$(BIN)/megallama generate $(RUN) --prompt "def main(" --max-tokens 96
	@$(BIN)/megallama report $(RUN)
	@echo "--- the run is in $(RUN); continue it with: megallama generate $(RUN) --prompt '...'"

bench: .venv/installed-dev .venv/peers/installed
	$(BIN)/python benchmarks/bench.py --json runs/bench.json

test: .venv/installed-dev
	$(BIN)/python -m pytest $(TWO_FILES)

test-layouts: .venv/installed-dev
	$(BIN)/python -m pytest -m layouts $(TWO_FILES)

test-benchmarks: .venv/installed-dev
	$(BIN)/python -m pytest -m benchmarks

test-peers: .venv/installed-dev .venv/chromium/installed
	$(BIN)/python -m pytest -m peers $(TWO_FILES)

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -m faults $(TWO_FILES)

test-slurm: .venv/installed-dev .venv/slurm/installed
	$(BIN)/python -m pytest -m slurm

test-mutants: .venv/installed-dev
	$(BIN)/python -m tests.mutants

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs data

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("megallama needs Python 3.11 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

# Beside the environment, which the versions that they ask for would change.
.venv/peers/installed: benchmarks/peers.sh | $(BIN)/python
	bash benchmarks/peers.sh .venv/peers

.venv/chromium/installed: tests/report/install.sh | $(BIN)/python
	bash tests/report/install.sh .venv/chromium
	touch $@

.venv/slurm/installed: tests/slurm/install.sh | $(BIN)/python
	bash tests/slurm/install.sh .venv/slurm
	touch $@
