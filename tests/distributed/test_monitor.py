"""Monitors of models that several processes hold together: one step, put together from what each has measured."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gptoss_opt import (
    compose,
    monitor_of,
    shard_experts,
    shard_tensor_parallel,
    with_flash_attention,
    with_lora,
    with_monitor,
)
from gptoss_opt.distributed.collectives import OBSERVERS
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.helpers import ids, tiny_model

STACKS = {
    "one": compose(),
    "one, adapters": compose(with_lora(rank=4)),
    "tp": compose(shard_tensor_parallel()),
    "ep": compose(shard_experts()),
    "tp + ep, adapters": compose(shard_tensor_parallel(), shard_experts(), with_lora(rank=4)),
    "all to all": compose(shard_experts(dispatch="all_to_all")),
}
ROWS = 4


def sent(reference: bool) -> float:
    """How many collectives a step has, with or without forwards of another model between its two passes."""
    policy = compose(shard_tensor_parallel(), with_monitor(every=1, to=()))(tiny_model(**UNEVEN))
    other = shard_tensor_parallel(tiny_model(**UNEVEN))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    loss = policy(ids(), labels=ids()).loss
    if reference:
        with torch.no_grad():
            other(ids())
    loss.backward()
    optimizer.step()
    return monitor_of(policy).steps[0].collectives["calls"]


def test_what_other_models_send_is_not_counted(ranks: Ranks) -> None:
    assert ranks(sent, True) == ranks(sent, False)


def side_by_side(path: str) -> None:
    model = with_monitor(tiny_model(num_hidden_layers=1), every=1, to=(path,))
    outer = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.0)
    for _ in range(2):
        outer(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    del outer


def test_one_of_several_replicas_writes(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    ranks(side_by_side, str(path))
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2]


def under_fsdp() -> list[float | None]:
    model = with_monitor(tiny_model(num_hidden_layers=2), every=1, to=())
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(ids(), labels=ids()).loss.backward()
        if torch.distributed.get_rank() == 0:
            # One rank alone looks, and waits for nobody.
            pickle.dumps(monitor_of(model).steps)
        optimizer.step()
        optimizer.zero_grad()
    return [step.grad_norm for step in monitor_of(model).steps]


def test_under_fsdp(ranks: Ranks) -> None:
    model = tiny_model(num_hidden_layers=2)
    model(ids(), labels=ids()).loss.backward()
    norm = float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]))
    assert all(norms == pytest.approx([norm] * 2, rel=1e-5) for norms in ranks(under_fsdp))


def trained(name: str, path: str) -> list[dict[str, Any]]:
    """The steps of two forwards in training, and the one of two in decoding that is measured."""
    torch.manual_seed(0)
    model = compose(STACKS[name], with_flash_attention(), with_monitor(every=2, to=(path,)))(tiny_model(**UNEVEN))
    tokens = ids(batch=ROWS, length=12)
    if name == "all to all":
        rows = ROWS // torch.distributed.get_world_size()
        tokens = tokens[rows * torch.distributed.get_rank() :][:rows]
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
            # One rank alone may look, and waits for nobody.
            monitor_of(model).report()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            model(tokens, use_cache=False)
    assert not OBSERVERS
    return [step.to_dict() for step in monitor_of(model).steps]


@pytest.mark.parametrize("name", [name for name in STACKS if not name.startswith("one")])
def test_steps_of_all_ranks(ranks: Ranks, name: str, tmp_path: Path) -> None:
    alone = trained("one, adapters" if "adapters" in name else "one", str(tmp_path / "alone.jsonl"))
    path = tmp_path / "steps.jsonl"
    found = ranks(trained, name, str(path))
    # All ranks have the same, and the first has written it.
    shown = [{**step, "utilisation": None} for step in found[0]]
    assert all([{**step, "utilisation": None} for step in steps] == shown for steps in found[1:])
    assert [json.loads(line) for line in path.read_text().splitlines()] == json.loads(json.dumps(found[0]))
    for step, expected in zip(found[0], alone, strict=True):
        assert step["number"] == expected["number"]
        assert step["tokens"] == expected["tokens"] == ROWS * 12
        # Every route of all tokens, once.
        assert [sum(layer) for layer in step["load"]] == [sum(layer) for layer in expected["load"]]
        assert step["parts"]["communication"] > 0
        assert step["collectives"]["calls"] > 0
        assert step["memory"] > 0
        for key in ("loss", "grad_norm"):
            assert step[key] == (None if expected[key] is None else pytest.approx(expected[key], rel=1e-3)), key
        assert step["sinks"] == pytest.approx(expected["sinks"], abs=1e-3)
    assert all(share > 0 for share in found[0][0]["sinks"])
    # In training the backward pass sends as well: more than decoding's forward alone.
    assert found[0][0]["collectives"]["calls"] > found[0][-1]["collectives"]["calls"]
    assert alone[0]["collectives"]["calls"] == 0
