"""How long pipeline ranks wait in a step, in closed form. Pure.

Tests hold it equal to the simulation of the lists that training runs, for every legal number of micro-batches.
"""

from __future__ import annotations


def waiting(schedule: str, pp: int, chunks: int, micro_batches: int) -> float:
    """Waiting over work of a rank, stages being equal and forward, input and weight gradients taking the same time.

    1F1B waits (pp - 1) / m of its work, interleaved (pp - 1) / (chunks * m) (arXiv 2104.04473, section 2.2), and more
    with fewer micro-batches than ranks, since each round of chunks then has gaps. ZBV waits while the pipeline fills,
    as long as pp - 1 forwards of one of its two chunks (arXiv 2401.10241, section 6). DualPipeV waits twice that: what
    the two of a pair make leaves after the second.
    """
    if pp == 1:
        return 0.0
    if schedule == "zbvzerobubble":
        return (pp - 1) / (6 * micro_batches)
    if schedule == "dualpipev":
        return (pp - 1) / (3 * micro_batches)
    gaps = (chunks - 1) * max(0, pp - micro_batches)
    return (pp - 1 + gaps) / (chunks * micro_batches)
