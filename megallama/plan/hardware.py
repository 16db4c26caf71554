"""Published peaks of accelerators, by the name their driver gives. Pure."""

from __future__ import annotations

import re

# Dense bf16 FLOP/s without sparsity. H100 comes in three forms with three peaks: match the whole name.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    (r"A100\b", 312e12),
    (r"H100 PCIe\b", 756e12),
    (r"H100 NVL\b", 835e12),
    (r"H100 80GB HBM3\b", 989.4e12),
    (r"H200\b", 989.4e12),
    (r"GH200\b", 989.4e12),
    (r"B200\b", 2250e12),
    (r"MI300X\b", 1307e12),
    (r"MI325X\b", 1307e12),
    (r"L40S\b", 362e12),
)


def published_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device, None for one that is not in the table: never a guess."""
    for pattern, peak in _BF16_PEAKS:
        if re.search(rf"\b{pattern}", device_name):
            return peak
    return None
