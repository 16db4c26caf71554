"""A plan as a picture: what lies in the memory of each pipeline rank, and how much there is.

matplotlib is imported when a picture is asked for: no other plan need wait for it.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.check import check_config
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.memory.state import GIB
from megallama.system.lock import beside, output_lock
from megallama.system.new_file import check_new_file, write_new_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

COMPONENTS = (
    *("bf16_weights", "fp32_weights", "fp32_gradients", "fp32_gradient_sums", "fp32_master_weights"),
    *("fp32_Adam_moments", "padding", "activations", "waiting_gradients", "logits", "transients"),
    *("buffers", "overhead", "fp32_average"),
)
"""Keys of the ledger; each has one colour in every picture."""


def plot_plan(config: RunConfig, world_size: int, path: Path, gpu: Gpu | None = None) -> None:
    """Draw the memory of a run on `world_size` ranks into `path`, a PNG, SVG or PDF, with what `gpu` has of it.

    UserError if the run is not legal there, or if `path` cannot be such a file.
    """
    check_target(path)
    with output_lock(beside(path), f"--plot={path}", "--plot"):
        picture = BytesIO()
        draw_plan(config, world_size, gpu).savefig(picture, format=path.suffix[1:].lower(), dpi=150)
        write_new_files({path: picture.getvalue()})


def check_target(path: Path) -> None:
    """UserError for a file that no picture can go to, or that is there."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot={path} is no picture; end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_new_file("--plot", path, "out.png")


def draw_plan(config: RunConfig, world_size: int, gpu: Gpu | None = None) -> Figure:
    """A bar for each pipeline rank, stacked of the rows of the ledger, in GiB; a line where the memory ends."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ranks = memory_rows(config, check_config(config, world_size).dp_size)
    figure = Figure(figsize=(11.0, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    names = {row.key: row.name for rows in ranks for row in rows if row.size}
    bottoms = [0.0] * len(ranks)
    for key in sorted(names, key=COMPONENTS.index):
        heights = [sum(row.size for row in rows if row.key == key) / GIB for rows in ranks]
        colour = colours(COMPONENTS.index(key))
        axes.bar(range(len(ranks)), heights, bottom=bottoms, width=0.7, color=colour, label=names[key])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for rank, total in enumerate(bottoms):
        axes.annotate(f"{total:.2f}", (rank, total), ha="center", va="bottom")
    if gpu is not None:
        limit = gpu.usable_bytes / GIB
        axes.axhline(limit, color="black", linestyle="--", label=f"{limit:.1f} GiB of {gpu.name}")
    axes.set(title="Memory of a rank at its fullest", xlabel="pipeline rank", ylabel="GiB", xticks=range(len(ranks)))
    axes.set_xlim(-0.5, max(4, len(ranks)) - 0.5)
    axes.margins(y=0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure
