"""The machine that a plan is for: found, or described in words."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..kernels import memory
from .cards import CARDS, Card

CPU_BANDWIDTH, CPU_FLOPS = 40e9, 500e9
"""What is assumed of a CPU that is described: bytes and operations of bfloat16 a second."""
MOST = 1_000_000
"""Of devices, of nodes, and of GB."""
READ, PRODUCT = 1 << 28, 1024
"""How many bytes are read, and how wide matrices are, to measure a CPU."""
USABLE = {"cpu": 0.92, "cuda": 0.98}
"""The part of a device's memory that one process can have."""
NETWORK = 12.5e9
"""What is assumed between nodes: 100 Gbit/s, in bytes a second, in each direction."""


class HardwareError(ValueError):
    """The description of a machine cannot be understood. The message says what can."""


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU with its memory.

    Attributes:
        kind: "cuda" or "cpu".
        name: as people call it.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        flops: products of bfloat16, operations a second.
        link: to the other devices of its node, bytes a second in each direction.
        capability: of a GPU.
    """

    kind: str
    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    capability: tuple[int, int] | None = None

    @property
    def usable(self) -> int:
        """The bytes that a process can have: what the driver, or the system, keeps for itself is taken off."""
        return round(self.memory * USABLE[self.kind])


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind in one node or more.

    Attributes:
        device: what each of them is.
        per_node: how many a node has.
        nodes: how many nodes there are.
        network: between nodes, bytes a second in each direction.

    Example:
        >>> print(described("2x(8xH100)"))
        2 nodes, each with 8 H100 (80 GB)
    """

    device: Device
    per_node: int = 1
    nodes: int = 1
    network: float = NETWORK

    @property
    def count(self) -> int:
        """How many devices there are in all."""
        return self.per_node * self.nodes

    def __str__(self) -> str:
        one = f"{self.device.name} ({self.device.memory / 1e9:.0f} GB)"
        each = one if self.per_node == 1 else f"{self.per_node} {one}"
        return each if self.nodes == 1 else f"{self.nodes} nodes, each with {each}"


FORMS = '"2x24GB", "1xH200", "4xA100-40GB", "cpu:24GB", or several nodes: "2x(8xH100)"'
_NODES = re.compile(r"(?P<nodes>\d+) ?x ?\((?P<node>.+)\)", re.IGNORECASE)
_CARDS = re.compile(r"(?:(?P<count>\d+) ?x ?)?(?P<card>.+)", re.IGNORECASE)
_CPU = re.compile(r"cpu(?: ?: ?(?P<memory>.+))?", re.IGNORECASE)
_MEMORY = re.compile(r"(?P<gigabytes>\d+(?:\.\d+)?) ?GB", re.IGNORECASE)
_SIZED = re.compile(r"(?P<name>.+)[ -](?P<gigabytes>\d+) ?GB", re.IGNORECASE)


def described(text: str) -> Hardware:
    """The machine that a text describes.

    A card is named, with its memory where there are several of that name, or it is only said how much memory it has:
    then the slowest card of at least that memory is assumed.

    Raises:
        HardwareError: the text is none of the known forms, or the card is not known.

    Example:
        >>> described("4xA100-40GB").count, described("cpu:24GB").device.memory
        (4, 24000000000)
    """
    if not isinstance(text, str):
        raise HardwareError(f"hardware is {text!r}. Describe it in words: {FORMS}.")
    whole = " ".join(text.split())
    if nodes := _NODES.fullmatch(whole):
        nested = _NODES.fullmatch(nodes["node"])
        node, count = described("cpu:1GB" if nested else nodes["node"]), _positive(nodes["nodes"], text)
        if node.device.kind == "cpu" or node.nodes > 1:
            raise HardwareError(f"{text!r} describes nodes of something else than GPUs. Known forms are {FORMS}.")
        return Hardware(node.device, node.per_node, count)
    if cpu := _CPU.fullmatch(whole):
        size = _MEMORY.fullmatch(cpu["memory"] or "")
        if size is None:
            raise HardwareError(f"{text!r} does not say how much memory there is. Write for example 'cpu:24GB'.")
        return Hardware(Device("cpu", "CPU", _bytes(size, text), CPU_BANDWIDTH, CPU_FLOPS, CPU_BANDWIDTH))
    cards = _CARDS.fullmatch(whole)
    if cards is None:
        raise HardwareError(f"{text!r} describes no machine. Known forms are {FORMS}.")
    return Hardware(_gpu(cards["card"], text), _positive(cards["count"] or "1", text))


def _positive(number: str, text: str) -> int:
    if len(number) > len(str(MOST)) or not 1 <= int(number) <= MOST:
        raise HardwareError(
            f"{_short(text)} has {_short(number)} devices or nodes: there must be one at least, of {MOST}."
        )
    return int(number)


def _short(text: str) -> str:
    return repr(text if len(text) < 60 else f"{text[:50]} ...")


def machine_of(hardware: str | Hardware | None) -> Hardware:
    """The machine that an argument means: this one, one in words, or one that is there.

    Raises:
        HardwareError: it means none.
    """
    if isinstance(hardware, Hardware):
        return hardware
    return detected() if hardware is None else described(hardware)


def _bytes(size: re.Match[str], text: str) -> int:
    gigabytes = float(size["gigabytes"]) if len(size["gigabytes"]) < 20 else math.inf
    if not 1e-9 <= gigabytes <= MOST:
        raise HardwareError(f"{_short(text)} has no memory, or more than {MOST:,} GB.")
    return round(gigabytes * 1e9)


def _gpu(card: str, text: str) -> Device:
    if size := _MEMORY.fullmatch(card):
        wanted = _bytes(size, text)
        like = _like(wanted)
        return _device(f"GPU like {_name(like)}", like, wanted)
    name, sized = _known(card), _SIZED.fullmatch(card)
    if name is None and sized:
        name = _known(sized["name"])
        if name and CARDS[name].gigabytes != int(sized["gigabytes"]):
            raise HardwareError(f"{text!r}: the {name} has {CARDS[name].gigabytes} GB, not {sized['gigabytes']}.")
    if name is None:
        several = [one for one in CARDS if _plain(one).startswith(_plain(card))]
        hint = f"Say which: {', '.join(several)}." if several else f"Known are {', '.join(CARDS)}; or give its memory."
        raise HardwareError(f"{text!r}: no card {card!r} is known. {hint}")
    return _device(name, CARDS[name], CARDS[name].gigabytes * 10**9)


def _like(memory: float) -> Card:
    """The slowest of the smallest cards with this many bytes of memory; the largest of all if none has so many."""
    cards = sorted(CARDS.values(), key=lambda card: (card.gigabytes, card.bandwidth))
    return next((card for card in cards if card.gigabytes * 1e9 >= memory), cards[-1])


def _known(card: str) -> str | None:
    return next((name for name in CARDS if _plain(name) == _plain(card)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _name(card: Card) -> str:
    return next(name for name, known in CARDS.items() if known is card)


def _device(name: str, card: Card, memory: int) -> Device:
    return Device("cuda", name, memory, card.bandwidth * 1e9, card.tflops * 1e12, card.link * 1e9, card.capability)


def detected() -> Hardware:
    """The machine that this process runs on: its GPUs, all of which must be alike, or its CPU.

    Rates of a GPU are those of its data sheet, or of the slowest known card with as much memory. Those of a CPU are
    measured once in a process, in a quarter of a second, with as many threads as torch has; its memory is what the
    process may have of it (cgroups).

    Raises:
        HardwareError: the GPUs are of several kinds. Choose some: CUDA_VISIBLE_DEVICES.
    """
    if not torch.cuda.is_available():
        bandwidth, flops = read_rate(torch.get_num_threads()), product_rate(torch.get_num_threads())
        return Hardware(Device("cpu", "CPU", memory_of_the_cpu(), bandwidth, flops, bandwidth))
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if len(kinds := {found.name for found in properties}) > 1:
        raise HardwareError(f"the GPUs are of several kinds: {', '.join(sorted(kinds))}. Set CUDA_VISIBLE_DEVICES.")
    name, memory = properties[0].name, min(found.total_memory for found in properties)
    return Hardware(card_of(name, memory), len(properties))


@cache
def read_rate(threads: int) -> float:
    """How fast this CPU reads its memory with so many threads, in bytes a second: the best of several sums."""
    room = memory.empty((READ // 8,), torch.int64).zero_()
    return READ / min(_seconds(room.sum) for _ in range(3))


@cache
def product_rate(threads: int) -> float:
    """How fast torch multiplies matrices of bfloat16 on this CPU with so many threads, in operations a second."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, dtype=torch.bfloat16)
    return 2 * PRODUCT**3 / min(_seconds(lambda: a @ b) for _ in range(3))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def card_of(name: str, memory: int) -> Device:
    """The card that CUDA calls `name`, with this many bytes of memory.

    Example:
        >>> card_of("NVIDIA H100 80GB HBM3", 85 * 10**9).flops, card_of("something", 24 * 10**9).name
        (989000000000000.0, 'something')
    """
    plain = _plain(name)
    known = [one for one in CARDS if all(_plain(word) in plain for word in re.split(r"[\s-]", one))]
    near = [CARDS[one] for one in known if abs(CARDS[one].gigabytes * 1e9 - memory) < 0.15 * memory]
    if near:
        # "H100 PCIe" is also an "H100": the longest name says most.
        return _device(name, max(near, key=lambda card: len(_name(card))), memory)
    return _device(name, _like(memory / 1.1), memory)


def memory_of_the_cpu() -> int:
    """The bytes of memory that this process may have: the machine's, or what its cgroup is given of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path).read_text().strip() if Path(path).exists() else "max"
        if limit.isdecimal():
            total = min(total, int(limit))
    return total
