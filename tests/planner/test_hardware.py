"""Machines that are described or found: forms, cards, and what is said about anything else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gptoss_opt.planner import HardwareError, described, detected
from gptoss_opt.planner import hardware as module
from gptoss_opt.planner.cards import CARDS
from gptoss_opt.planner.hardware import card_of, memory_of_the_cpu


@pytest.mark.parametrize(
    ("text", "shown", "count", "memory"),
    [
        ("1xH200", "H200 (141 GB)", 1, 141),
        ("h200", "H200 (141 GB)", 1, 141),
        ("4xA100-40GB", "4 A100-40GB (40 GB)", 4, 40),
        ("4 x A100 80 GB", "4 A100-80GB (80 GB)", 4, 80),
        ("H100-80GB", "H100 (80 GB)", 1, 80),
        ("2xRTX 4090", "2 RTX 4090 (24 GB)", 2, 24),
        ("2x24GB", "2 GPU like L4 (24 GB)", 2, 24),
        ("1x12.5GB", "GPU like RTX 4060 Ti (12 GB)", 1, 12.5),
        ("1x1000GB", "GPU like B300 (1000 GB)", 1, 1000),
        ("2x(8xH100)", "2 nodes, each with 8 H100 (80 GB)", 16, 80),
        ("3x(1xL4)", "3 nodes, each with L4 (24 GB)", 3, 24),
        ("cpu:24GB", "CPU (24 GB)", 1, 24),
        ("CPU: 16 gb", "CPU (16 GB)", 1, 16),
    ],
)
def test_forms(text: str, shown: str, count: int, memory: float) -> None:
    found = described(text)
    assert (str(found), found.count, found.device.memory) == (shown, count, memory * 1e9)
    assert found.device.kind == ("cpu" if "cpu" in text.lower() else "cuda")


@pytest.mark.parametrize("name", CARDS)
def test_every_card_can_be_described(name: str) -> None:
    device, card = described(f"2x{name}").device, CARDS[name]
    assert (device.name, device.memory, device.capability) == (name, card.gigabytes * 10**9, card.capability)
    assert (device.bandwidth, device.flops, device.link) == (card.bandwidth * 1e9, card.tflops * 1e12, card.link * 1e9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "describes no machine"),
        ("4xA100", "A100-40GB, A100-80GB"),
        ("1xB42", "Known are T4"),
        ("H100-40GB", "has 80 GB, not 40"),
        ("0xH100", "one at least"),
        ("0x(8xH100)", "one at least"),
        ("1x0GB", "no memory"),
        ("cpu", "cpu:24GB"),
        ("cpu:much", "cpu:24GB"),
        ("2x(cpu:24GB)", "something else than GPUs"),
        ("2x(2x(8xH100))", "something else than GPUs"),
        ("eight cards", "no card"),
    ],
)
def test_what_is_not_understood(text: str, said: str) -> None:
    with pytest.raises(HardwareError, match=said):
        described(text)


@pytest.mark.parametrize(
    ("name", "gigabytes", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "H100"),
        ("NVIDIA H100 PCIe", 85.0, "H100 PCIe"),
        ("NVIDIA H200", 150.1, "H200"),
        ("NVIDIA A100-SXM4-40GB", 42.3, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", 25.4, "RTX 4090"),
        ("Tesla T4", 15.6, "T4"),
        ("NVIDIA L4", 23.6, "L4"),
        ("NVIDIA L40S", 47.7, "L40S"),
        ("Something New", 23.6, "L4"),
        ("Something Large", 900, "B300"),
    ],
)
def test_names_that_cuda_gives(name: str, gigabytes: float, card: str) -> None:
    device = card_of(name, round(gigabytes * 1e9))
    assert (device.name, device.memory) == (name, round(gigabytes * 1e9))
    assert device.bandwidth == CARDS[card].bandwidth * 1e9
    assert device.flops == CARDS[card].tflops * 1e12


def test_gpus_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="NVIDIA L4", total_memory=memory) for memory in (23_600_000_000, 23_500_000_000)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    found = detected()
    assert (found.per_node, found.nodes, found.device.memory) == (2, 1, 23_500_000_000)
    cards.append(SimpleNamespace(name="Tesla T4", total_memory=15_600_000_000))
    with pytest.raises(HardwareError, match="NVIDIA L4, Tesla T4"):
        detected()


def test_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = memory_of_the_cpu()
    assert detected().device.memory == whole > 1e8
    limit = tmp_path / "memory.max"
    real = module.Path
    monkeypatch.setattr(module, "Path", lambda path: limit if path == "/sys/fs/cgroup/memory.max" else real(path))
    limit.write_text("max\n")
    assert memory_of_the_cpu() == whole
    limit.write_text("123456789\n")
    assert memory_of_the_cpu() == 123_456_789
