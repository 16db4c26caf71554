"""What `megallama verify --types` found, as tables for people or an object for scripts."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megallama.config.schema import RunConfig
from megallama.verify.types import LOSS, TOKENS, TYPED, WORDS, TypeReport, hidden_types, weight_types


def print_types(report: TypeReport, config: RunConfig, console: Console) -> None:
    """A row per axis with what a stage is given and returns, and a row per stage with what was checked in it."""
    wide = [name for name in reversed(TYPED) if getattr(report.topology, name) > 1]
    axes = Table(title="the types along each axis that has more than one rank", title_justify="left")
    for column in ("axis", "ranks", "tokens", "cut weights", "norms", "hidden states", "loss"):
        axes.add_column(column, justify="right" if column == "ranks" else "left", no_wrap=True)
    cut = weight_types(cut=True, share=False)
    norms = weight_types(cut=False, share=config.parallel.sequence_parallel)
    given = TOKENS, cut, norms, hidden_types(config), LOSS
    for name in wide:
        axes.add_row(name, str(getattr(report.topology, name)), *[WORDS[types[name]] for types in given])
    console.print(axes)
    stages = Table(title="what was checked, and the collectives with a gradient in it", title_justify="left")
    for column in ("stage", "layers", "weights", "operations", *(f"over {name}" for name in wide)):
        stages.add_column(column, justify="right" if column in ("stage", "weights", "operations") else "left")
    for checked in report.stages:
        over = [", ".join(f"{n} {what}" for what, n in checked.crossings[axis].items()) or "-" for axis in wide]
        counts = str(checked.weights), str(checked.operations)
        stages.add_row(str(checked.stage.index), _layers(checked.stage.layers), *counts, *over)
    console.print(stages)
    if report.fault is None:
        console.print("every type fits" if wide else "one rank on every axis but pp: nothing is shared")
        return
    stage = report.fault.stage
    console.print(f"stage {stage.index}, layers {_layers(stage.layers)}: a type does not fit", style="red")
    for line in (*report.fault.lines, report.fault.sentence):
        console.print(escape(line), highlight=False, soft_wrap=True)


def types_as_json(report: TypeReport) -> str:
    """Everything in the tables, and the fault, as one object."""
    stages = [
        {"stage": checked.stage.index, "layers": list(checked.stage.layers), "weights": checked.weights}
        | {"operations": checked.operations, "crossings": checked.crossings}
        for checked in report.stages
    ]
    fault = report.fault
    found = None if fault is None else {"stage": fault.stage.index, "sentence": fault.sentence, "lines": fault.lines}
    return json.dumps(
        {"passed": fault is None, "mesh": asdict(report.topology), "stages": stages, "fault": found}, indent=2
    )


def _layers(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}"
