"""What a wrapper keeps is handed back to it when it is attached again, and what is chosen is chosen once."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from gptoss_opt import (
    Wrapper,
    compose,
    explain,
    load,
    shard_experts,
    shard_tensor_parallel,
    stack_of,
    undo,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.core import WRAPPERS
from gptoss_opt.extend import GPT_OSS, Attachment, Host, Phase, Report
from tests.helpers import GOLDEN, ids, tiny_model

OTHERS = (with_mxfp4_experts, with_flash_attention, shard_tensor_parallel)


def counted(counts: Counter[str], module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    counts["forwards"] += 1
    return inner(*args, **kwargs)


@dataclass(frozen=True, kw_only=True, repr=False)
class Counting(Wrapper):
    """Counts the forwards of the model, and how often it was attached."""

    name: ClassVar[str] = "with_toy_counting"
    phase: ClassVar[Phase] = Phase.OBSERVE
    host: ClassVar[Host] = GPT_OSS

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        journal.state = journal.state or Counter()
        journal.state["attached"] += 1
        journal.around(model, "", counted, journal.state)
        return Report(("counts its forwards",))


@pytest.fixture(autouse=True, scope="module")
def _toy():
    yield
    WRAPPERS.pop(Counting.name, None)


def counts(model: nn.Module) -> Counter[str]:
    return model._gptoss_opt_record.applied[-1].state


@torch.no_grad()
def test_counts_go_on_through_three_other_wrappers() -> None:
    model = Counting()(tiny_model())
    model(ids())
    for number, wrap in enumerate(OTHERS, 2):
        wrap(model)
        model(ids())
        assert counts(model) == {"forwards": number, "attached": number}
    twin = copy.deepcopy(model)
    twin(ids())
    assert (counts(model)["forwards"], counts(twin)["forwards"]) == (4, 5)
    undo(model, with_flash_attention)
    model(ids())
    assert counts(model) == {"forwards": 5, "attached": 5}
    # Taken off and put on again, it begins anew.
    undo(model, Counting)
    Counting()(model)
    assert counts(model) == {"attached": 1}


@torch.no_grad()
def test_counts_survive_a_failure_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()(tiny_model())
    model(ids())

    def fails(*args: Any) -> None:
        raise RuntimeError("as it should")

    monkeypatch.setattr(type(with_flash_attention()), "attach", fails)
    with pytest.raises(RuntimeError, match="as it should"):
        with_flash_attention(model)
    model(ids())
    assert counts(model)["forwards"] == 2
    assert stack_of(model) == compose(Counting())


def test_each_backend_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Counter[str] = Counter()
    with_choice = (with_mxfp4_experts, with_flash_attention, shard_experts)

    def counting(kind: type[Wrapper]) -> None:
        real = kind.choice
        monkeypatch.setattr(kind, "choice", lambda self, model: chosen.update([self.name]) or real(self, model))

    for wrap in (*with_choice, with_fast_experts):
        counting(type(wrap()))
    model = compose(*(wrap() for wrap in with_choice))(tiny_model())
    once = {wrap.__name__: 1 for wrap in with_choice}
    assert chosen == once
    assert all(row.backend for row in explain(model).rows)
    chosen.clear()
    with_fast_experts(model)  # it stands by; those that are there are asked whether they would choose otherwise now
    assert chosen == once
    chosen.clear()
    undo(model, with_fast_experts, with_flash_attention)
    assert not chosen, "what stays keeps its backend"
    load(GOLDEN, *(wrap() for wrap in with_choice))
    assert chosen == once
