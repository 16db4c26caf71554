"""Accelerators as data: what each can do, where it is known, and which one is meant. Imports no torch.

`hardware.yaml` beside this file has the figures and their sources. A user's file in the same form is laid over it: it
adds accelerators, or replaces single figures of one that is there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.config.load import parse_yaml, read_text
from megallama.errors import UserError

USABLE = 0.97
"""The share of a device's memory that is left to a run: the driver keeps 1 to 3 %."""
USER_FILE = Path("~/.config/megallama/hardware.yaml")

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Gpu(BaseModel):
    """One accelerator; None is what nobody has published, and is never guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    key: str
    """What a plan is asked for: h100-80g."""
    name: str
    """What a person calls it."""
    alias: str | None = None
    """Shorter, for the form that people mean by it: h100."""
    kind: Literal["gpu", "cpu"] = "gpu"
    """The figures of a CPU are measured on the machine, in the type of the run."""
    driver_name: str | None = None
    """Pattern in the name that its driver gives."""
    peak_tflops: Positive | None = None
    """Dense bf16 TFLOP/s; of a CPU, of a measured matmul."""
    matmul_tflops: Positive | None = None
    """Best matmul that anybody measured, TFLOP/s."""
    memory_gib: Positive | None = None
    """Memory as sold; the driver keeps a few per cent."""
    memory_tb_s: Positive | None = None
    """Bandwidth of that memory, TB/s."""
    gpus_per_node: Count | None = None
    """GPUs that the fast link joins."""
    node_link_gb_s: Positive | None = None
    """One way, GB/s per GPU, within a node: NVLink, Infinity Fabric or PCIe."""
    nic_gb_s: Positive | None = None
    """One way, GB/s per GPU, between nodes."""
    power_w: Positive | None = None
    """Power limit in W."""
    efficiency_of: str | None = None
    """Another one with the same chip, whose constants hold for this one as well."""
    efficiency: Mapping[str, Share] = {}
    """Share of the peak at which matmuls run in training, by generation of software; the first is the default."""

    @property
    def usable_bytes(self) -> int:
        """The memory that is left to a run; UserError where that is not known."""
        return int(self.known("memory_gib") * 2**30 * USABLE)

    def known(self, field: str) -> float:
        """The figure of `field` in its own unit; UserError where it is null."""
        value = getattr(self, field)
        if value is None:
            raise UserError(f"{self.key}.{field} is not known; give it in {USER_FILE} or by --hardware FILE")
        return float(value)

    def efficiency_for(self, software: str | None = None) -> float:
        """The constant of one generation of software, the default one if None; UserError if there is none."""
        if not self.efficiency:
            raise UserError(
                f"{self.key}.efficiency is not known; assume a speed by --mfu 0.4, calibrate with a run, "
                f"or give it in {USER_FILE} or by --hardware FILE, between 0 and 1"
            )
        chosen = next(iter(self.efficiency)) if software is None else software
        if chosen not in self.efficiency:
            raise UserError(f"{self.key} has no efficiency for {chosen}; it has {', '.join(self.efficiency)}")
        return self.efficiency[chosen]


def load_hardware(path: str | Path | None = None) -> dict[str, Gpu]:
    """Every accelerator by its short name: the built-in ones, the user's own file over them, then `path`.

    UserError for a file that is missing or holds what no accelerator has.
    """
    entries = _entries()
    own = USER_FILE.expanduser()
    for file in ([own] if own.exists() else []) + ([Path(path)] if path is not None else []):
        _lay_over(entries, parse_yaml(read_text(file), str(file)), str(file))
    return _accelerators(entries)


def built_in_hardware() -> dict[str, Gpu]:
    """Every accelerator of `hardware.yaml` alone, whatever the user's file says."""
    return _accelerators(_entries())


def find_gpu(name: str, hardware: Mapping[str, Gpu] | None = None) -> Gpu:
    """The accelerator of that key or alias, whatever its case; UserError with the nearest names if there is none."""
    known = load_hardware() if hardware is None else hardware
    wanted = _plain(name)
    keys = {_plain(key): key for key in known}
    for gpu in known.values():
        if wanted in _names(gpu):
            return gpu
    begin = [plain for plain in keys if plain.startswith(wanted)] if wanted else []
    near = begin or difflib.get_close_matches(wanted, keys, n=3, cutoff=0.5)
    hint = f"did you mean {_or([keys[plain] for plain in near])}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"the GPU {name} is not known; {hint}")


def gpu_of_driver(device_name: str, hardware: Mapping[str, Gpu]) -> Gpu | None:
    """The accelerator that its driver calls so, or `cpu` for a CPU; None where none of them is: never a guess."""
    if device_name == "cpu":
        return hardware.get("cpu")
    for gpu in hardware.values():
        if gpu.driver_name and re.search(_as_words(gpu.driver_name), device_name):
            return gpu
    return None


@cache
def published_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device by its driver's name, None for one that is not in the table: never a guess."""
    for entry in _built_in().values():
        pattern = (entry or {}).get("driver_name")
        if pattern and re.search(_as_words(pattern), device_name):
            return float(entry["peak_tflops"] * 1e12)
    return None


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    # The C parser takes a tenth of the time; not every build of PyYAML has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)
    return entries


def _entries() -> dict[str, dict[str, Any]]:
    return {key: dict(fields or {}) for key, fields in _built_in().items()}


def _accelerators(entries: dict[str, dict[str, Any]]) -> dict[str, Gpu]:
    _share_efficiency(entries)
    found = {key: _checked(key, fields) for key, fields in entries.items()}
    owners: dict[str, str] = {}
    for gpu in found.values():
        for name in _names(gpu):
            if name in owners:
                raise UserError(
                    f"{gpu.key} is called {name}, as {owners[name]} is; give it another key or alias, "
                    f"or write {owners[name]} to replace figures of that one"
                )
            owners[name] = gpu.key
    return found


def _names(gpu: Gpu) -> set[str]:
    """By which it is found."""
    return {_plain(name) for name in (gpu.key, gpu.alias) if name}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _as_words(driver_name: str) -> str:
    """The pattern, where it is no part of a longer word."""
    return rf"\b{driver_name}\b"


def _lay_over(entries: dict[str, dict[str, Any]], tree: Any, where: str) -> None:
    """Replace in `entries` what `tree` gives, in place; constants of efficiency are added to those that are there."""
    if not isinstance(tree, dict):
        raise UserError(f"{where} is not a mapping of GPUs; write it as in megallama/plan/hardware.yaml")
    for key, fields in tree.items():
        if not isinstance(fields, dict):
            raise UserError(f"{where}: {key} is not a mapping of figures; write it as {key}: {{peak_tflops: 989.4}}")
        for field in fields:
            _refuse_unknown(str(key), str(field), where)
        entry = entries.setdefault(str(key), {"name": str(key)})
        if "efficiency" in fields:
            fields = {**fields, "efficiency": _own_first(_constants(key, fields, where), entry.get("efficiency"))}
        entry.update(fields)


def _refuse_unknown(key: str, field: str, where: str) -> None:
    legal = [name for name in Gpu.model_fields if name != "key"]
    if field not in legal:
        near = difflib.get_close_matches(field, legal, n=1, cutoff=0.4)
        hint = f"did you mean {key}.{near[0]}?" if near else f"legal: {', '.join(legal)}"
        raise UserError(f"{where}: unknown key {key}.{field}; {hint}")


def _constants(key: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    constants = fields["efficiency"] or {}
    if not isinstance(constants, dict):
        raise UserError(
            f"{where}: {key}.efficiency={constants} is not a mapping; write it as efficiency: {{mine: {constants}}}"
        )
    return constants


def _own_first(own: Mapping[str, Any], others: Mapping[str, Any] | None) -> dict[str, Any]:
    """Constants of both; those of `own` win, and come first, so that its first is the default."""
    return {**own, **{name: value for name, value in (others or {}).items() if name not in own}}


def _share_efficiency(entries: dict[str, dict[str, Any]]) -> None:
    """Give each one the constants of the one that it shares its chip with; in place.

    A user's come before those that are built in, its own first; of these the default of the chip is the default.
    """
    own = {key: dict(fields.get("efficiency") or {}) for key, fields in entries.items()}
    for key, fields in entries.items():
        other = fields.get("efficiency_of")
        if other is None:
            continue
        if not isinstance(other, str) or other not in entries:
            raise UserError(f"{key}.efficiency_of={other} is no GPU that is known; known: {', '.join(entries)}")
        order = list((_built_in().get(other) or {}).get("efficiency") or {})
        merged = _own_first(own[key], own[other])
        names = sorted(merged, key=lambda name: order.index(name) if name in order else -1)
        fields["efficiency"] = {name: merged[name] for name in names}


def _checked(key: str, fields: Mapping[str, Any]) -> Gpu:
    try:
        gpu = Gpu(key=key, **fields)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        at = ".".join(map(str, detail["loc"]))
        message = detail["msg"][:1].lower() + detail["msg"][1:]
        raise UserError(f"{key}.{at}={detail['input']} is not legal: {message}") from None
    for name in (key, gpu.name):
        if not name.isprintable():  # it would break the line of a comment or of a table
            raise UserError(f"the name {name!r} of a GPU is not legal: it takes more than one line; write it on one")
    try:
        re.compile(_as_words(gpu.driver_name or ""))
    except re.error as error:
        raise UserError(
            f"{key}.driver_name={gpu.driver_name} is no regular expression ({error.msg}); "
            "write the driver's words as they are, with \\ before each ( [ ? * +"
        ) from None
    return gpu


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
