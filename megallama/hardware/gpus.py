"""Accelerators as data: what each can do, where it is known, and which one is meant. Imports no torch.

`hardware.yaml` beside this file has the figures and their sources. A user's file in the same form is laid over it: it
adds accelerators, or replaces single figures of one that is there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.config.load import parse_yaml, read_text
from megallama.errors import UserError

USABLE = 0.97
"""The share of a device's memory that is left to a run: the driver keeps 1 to 3 %."""
LINK_FRACTION = 0.80
"""The share of a link's bandwidth that rings within a node reach."""
USER_FILE = Path("~/.config/megallama/hardware.yaml")

Entries = dict[str, dict[str, Any]]
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
    fp8: bool = False
    """Whether torch multiplies on it in fp8, at twice the peak: from Ada and Hopper on."""
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

    def default_efficiency(self) -> float:
        """The first constant; UserError if there is none."""
        if not self.efficiency:
            raise UserError(
                f"{self.key}.efficiency is not known; assume a speed by --mfu 0.4, calibrate with a run, "
                f"or give it in {USER_FILE} or by --hardware FILE, between 0 and 1"
            )
        return next(iter(self.efficiency.values()))


def load_hardware(path: str | Path | None = None) -> dict[str, Gpu]:
    """Every accelerator by its short name: the built-in ones, the user's own file over them, then `path`.

    UserError for a file that is missing or holds what no accelerator has.
    """
    entries, own = _built_in(), USER_FILE.expanduser()
    for file in ([own] if own.exists() else []) + ([Path(path)] if path is not None else []):
        _lay_over(entries, parse_yaml(read_text(file), str(file)), str(file))
    return _accelerators(entries)


def built_in_hardware() -> dict[str, Gpu]:
    """Every accelerator of `hardware.yaml` alone, whatever the user's file says."""
    return _accelerators(_built_in())


def find_gpu(name: str, hardware: Mapping[str, Gpu] | None = None) -> Gpu:
    """The accelerator of that key or alias, whatever its case; UserError with the nearest names if there is none."""
    known = load_hardware() if hardware is None else hardware
    wanted, keys = _plain(name), {_plain(key): key for key in known}
    for gpu in known.values():
        if wanted in _names(gpu):
            return gpu
    begin = [plain for plain in keys if plain.startswith(wanted)] if wanted else []
    near = [keys[plain] for plain in begin or difflib.get_close_matches(wanted, keys, n=3, cutoff=0.5)]
    hint = (
        f"did you mean {', '.join(near[:-1])}{' or ' * (len(near) > 1)}{near[-1]}?"
        if near
        else f"known: {', '.join(known)}"
    )
    raise UserError(f"the GPU {name} is not known; {hint}")


def gpu_of_driver(device_name: str, hardware: Mapping[str, Gpu]) -> Gpu | None:
    """The accelerator that its driver calls so, or `cpu` for a CPU; None where none of them is: never a guess."""
    if device_name == "cpu":
        return hardware.get("cpu")
    named = (gpu for gpu in hardware.values() if gpu.driver_name)
    return next((gpu for gpu in named if re.search(_as_words(gpu.driver_name or ""), device_name)), None)


def _built_in() -> Entries:
    # The C parser takes a tenth of the time; not every build of PyYAML has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries: Entries = yaml.load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"), Loader=loader)
    return {key: dict(fields or {}) for key, fields in entries.items()}


def _accelerators(entries: Entries) -> dict[str, Gpu]:
    _share_efficiency(entries)
    found = {key: _checked(key, fields) for key, fields in entries.items()}
    owners: dict[str, str] = {}
    for gpu in found.values():
        for name in _names(gpu):
            if owners.setdefault(name, gpu.key) != gpu.key:
                raise UserError(
                    f"{gpu.key} is called {name}, as {owners[name]} is; give it another key or alias, "
                    f"or write {owners[name]} to replace figures of that one"
                )
    return found


def _names(gpu: Gpu) -> set[str]:
    """By which it is found."""
    return {_plain(name) for name in (gpu.key, gpu.alias) if name}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _as_words(driver_name: str) -> str:
    """The pattern, where it is no part of a longer word."""
    return rf"\b{driver_name}\b"


def _lay_over(entries: Entries, tree: Any, where: str) -> None:
    """Replace in `entries` what `tree` gives, in place; constants of efficiency are added to those that are there."""
    if not isinstance(tree, dict) or not all(isinstance(fields, dict) for fields in tree.values()):
        raise UserError(f"{where} is not a mapping of GPUs; write each as h100-80g: {{peak_tflops: 989.4}}")
    for key, fields in tree.items():
        entry, own = entries.setdefault(str(key), {"name": str(key)}), fields.get("efficiency") or {}
        if not isinstance(own, dict):
            raise UserError(
                f"{where}: {key}.efficiency={own} is not a mapping; write it as efficiency: {{mine: {own}}}"
            )
        entry |= fields | {"efficiency": _own_first(own, entry.get("efficiency") or {})}


def _own_first(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Constants of both; those of `own` win, and come first, so that its first is the default."""
    return {**own, **{name: value for name, value in others.items() if name not in own}}


def _share_efficiency(entries: Entries) -> None:
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
        order = list(_built_in().get(other, {}).get("efficiency", {}))
        merged = _own_first(own[key], own[other])
        names = sorted(merged, key=lambda name: order.index(name) if name in order else -1)
        fields["efficiency"] = {name: merged[name] for name in names}


def _checked(key: str, fields: Mapping[str, Any]) -> Gpu:
    legal = [name for name in Gpu.model_fields if name != "key"]
    for field in map(str, fields):
        if field not in legal:
            near = difflib.get_close_matches(field, legal, n=1, cutoff=0.4)
            hint = f"did you mean {key}.{near[0]}?" if near else f"legal: {', '.join(legal)}"
            raise UserError(f"unknown key {key}.{field}; {hint}")
    try:
        gpu = Gpu(key=key, **fields)
        re.compile(_as_words(gpu.driver_name or ""))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        at = ".".join(map(str, detail["loc"]))
        raise UserError(
            f"{key}.{at}={detail['input']} is not legal: {detail['msg'][0].lower()}{detail['msg'][1:]}"
        ) from None
    except re.error as error:
        raise UserError(
            f"{key}.driver_name={fields['driver_name']} is no regular expression ({error.msg}); "
            "write the driver's words as they are, with \\ before each ( [ ? * +"
        ) from None
    for name in (key, gpu.name):
        if not name.isprintable():  # it would break the line of a comment or of a table
            raise UserError(f"the name {name!r} of a GPU is not legal: it takes more than one line; write it on one")
    return gpu
