"""What graphics cards have, by their data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """One card.

    Attributes:
        gigabytes: its memory, 10^9 bytes.
        bandwidth: of that memory, GB/s.
        tflops: dense products of bfloat16, of float16 where it has no bfloat16, 10^12 operations a second.
        link: to the other cards of its machine, GB/s in each direction; over PCIe where it has no NVLink.
        capability: its compute capability.
    """

    gigabytes: int
    bandwidth: float
    tflops: float
    link: float
    capability: tuple[int, int]


PCIE_3, PCIE_4, PCIE_5 = 16, 32, 64
"""GB/s in each direction over 16 lanes."""

CARDS: dict[str, Card] = {
    "T4": Card(16, 320, 65, PCIE_3, (7, 5)),
    "V100-16GB": Card(16, 900, 125, 150, (7, 0)),
    "V100-32GB": Card(32, 900, 125, 150, (7, 0)),
    "RTX 4060 Ti": Card(16, 288, 88, PCIE_4, (8, 9)),
    "RTX 4080": Card(16, 717, 97, PCIE_4, (8, 9)),
    "RTX 5080": Card(16, 960, 113, PCIE_5, (12, 0)),
    "A10": Card(24, 600, 125, PCIE_4, (8, 6)),
    "L4": Card(24, 300, 121, PCIE_4, (8, 9)),
    "RTX 3090": Card(24, 936, 71, PCIE_4, (8, 6)),
    "RTX 4090": Card(24, 1008, 165, PCIE_4, (8, 9)),
    "RTX 5090": Card(32, 1792, 210, PCIE_5, (12, 0)),
    "A100-40GB": Card(40, 1555, 312, 300, (8, 0)),
    "A40": Card(48, 696, 150, PCIE_4, (8, 6)),
    "RTX A6000": Card(48, 768, 155, PCIE_4, (8, 6)),
    "L40S": Card(48, 864, 362, PCIE_4, (8, 9)),
    "A100-80GB": Card(80, 2039, 312, 300, (8, 0)),
    "H100": Card(80, 3350, 989, 450, (9, 0)),
    "H100 PCIe": Card(80, 2000, 756, PCIE_5, (9, 0)),
    "H100 NVL": Card(94, 3900, 835, 300, (9, 0)),
    "GH200": Card(96, 4000, 989, 450, (9, 0)),
    "H200": Card(141, 4800, 989, 450, (9, 0)),
    "B200": Card(180, 7700, 2250, 900, (10, 0)),
    "B300": Card(270, 7700, 2250, 900, (10, 3)),
}
"""By NVIDIA's data sheets. Cards with tensor cores that halve their rate for sums in float32 have that rate."""
