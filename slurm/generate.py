"""Writes the sbatch files of the recipes: `python slurm/generate.py`. A test holds the files against what it makes."""

from __future__ import annotations

from pathlib import Path

from megallama.cluster.job_file import Allocation, job_file

FOLDER = Path(__file__).parent
HOME = '${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}'
"""Also where one is run by hand, which then says that it is inside no job."""
RECIPES = {
    # What it is, nodes of 8 GPUs, layout, seconds ahead of the time limit that a save may need.
    "1b": ("A Llama of 1.1B parameters", 1, "dp 8", 300),
    "7b": ("Llama 7B", 16, "tp 2, pp 4, dp 16", 300),
    "8b": ("Llama 3 8B", 8, "tp 2, dp 32", 300),
    "70b": ("Llama 3 70B", 64, "tp 8, pp 8, dp 8", 600),
    "405b": ("Llama 3.1 405B", 256, "tp 8, pp 16, dp 16", 600),
}


def text_of(name: str) -> str:
    """The sbatch file of a recipe."""
    what, nodes, layout, seconds = RECIPES[name]
    where = "one node" if nodes == 1 else f"{nodes} nodes"
    about = [
        f"{what} on {where} of 8 GPUs: {layout}.",
        f"Submit from the repository root: sbatch slurm/{name}.sh [key.sub=value ...]; docs/clusters.md says more.",
    ]
    allocation = Allocation(nodes, 8, gpus=True, time="7-00:00:00", signal_seconds=seconds)
    return job_file(Path(f"configs/{name}.yaml"), (), Path(name), "%x-%j.log", allocation, about, HOME)


if __name__ == "__main__":
    for recipe in RECIPES:
        (FOLDER / f"{recipe}.sh").write_text(text_of(recipe), encoding="utf-8")
