"""Adapters folded into weights, and whole checkpoints with them, which others load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from gptoss_opt import (
    adapters_off,
    compose,
    export,
    load,
    load_adapter,
    merge_lora,
    stack_of,
    undo,
    with_flash_attention,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.kernels.mxfp4 import BLOCK, unpack
from tests.helpers import GOLDEN, ids, relative, tiny_config, tiny_model

PLAIN = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapted(*others: Any, std: float = 0.3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with adapters whose second factors are not zero."""
    model = compose(*others, with_lora(rank=4, **options))(tiny_model(dtype))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=std)
    return model


def plain(path: Path) -> Any:
    """What plain transformers loads, in float32."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.float().eval()


def of_golden() -> dict[str, Tensor]:
    """The tensors of the checkpoint in the released format."""
    return {name: t for file in GOLDEN.glob("model-*.safetensors") for name, t in load_file(file).items()}


def assert_same_weights(actual: Any, expected: Any) -> None:
    """All weights are those of another model, rounded to bfloat16."""
    found = actual.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in expected.state_dict().items())


def everything() -> tuple[str, ...]:
    return "q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj", "lm_head"


def test_dense_weights_take_the_change_up() -> None:
    model, base = adapted(with_flash_attention(), targets=everything()), tiny_model()
    expected = model(ids()).logits
    report = merge_lora(model)
    assert relative(model(ids()).logits, expected) < 1e-5
    assert relative(base(ids()).logits, expected) > 0.1, "the adapters change nothing"
    assert stack_of(model) == compose(with_flash_attention())
    assert list(model.state_dict()) == list(base.state_dict())
    assert len(report.weights) == 3 * 7 + 1
    assert all(found.change_sqnr > 100 for found in report.weights.values())
    assert "model.layers.0.mlp.router.weight" in str(report)
    assert "<table>" in report._repr_html_()


def test_what_no_adapter_touches_stays_bit_for_bit() -> None:
    model = adapted(with_mxfp4_experts(), targets="down_proj", layers=1)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj_lora_B[1:] = 0  # the other experts have no change
        experts.down_proj_lora_A[0, :, BLOCK:] = 0  # nor has this one beyond its first block of inputs
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    merge_lora(model, lossy=True)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    there = "model.layers.1.mlp.experts.down_proj_blocks"
    assert there in changed
    assert changed <= {there, there.replace("blocks", "scales")}
    now, then = model.state_dict()[there], before[there]
    assert torch.equal(now[1:], then[1:])
    assert torch.equal(now[0, :, 1:], then[0, :, 1:])


def test_packed_weights_are_the_nearest_to_the_changed_ones() -> None:
    model = adapted(with_mxfp4_experts(), std=2.0, targets="gate_up_proj")
    experts = model.model.layers[0].mlp.experts
    scale, a, b = 4.0, experts.gate_up_proj_lora_A, experts.gate_up_proj_lora_B
    old = unpack(experts.gate_up_proj_blocks.data, experts.gate_up_proj_scales.data)
    wanted = (old + scale * (b @ a)).detach()
    report = merge_lora(model)
    new = unpack(experts.gate_up_proj_blocks.data, experts.gate_up_proj_scales.data)
    found = report.weights["model.layers.0.mlp.experts.gate_up_proj"]
    noise = (new - wanted).square().sum()
    assert found.sqnr == pytest.approx(float(10 * (wanted.square().sum() / noise).log10()), rel=1e-4)
    assert found.change_sqnr == pytest.approx(float(10 * ((wanted - old).square().sum() / noise).log10()), rel=1e-4)
    assert 15 < found.sqnr < 25


def test_a_change_that_rounds_away_is_refused_with_the_numbers() -> None:
    model = adapted(with_mxfp4_experts(), std=2e-3)
    before, stack = {name: t.clone() for name, t in model.state_dict().items()}, stack_of(model)
    with pytest.raises(ValueError, match=r"the change of 6 of 18 weights would round away; .*_proj \d\.\d dB"):
        merge_lora(model)
    assert stack_of(model) == stack
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = merge_lora(model, lossy=True)
    assert {name.rpartition(".")[2] for name in report.lost} == {"gate_up_proj", "down_proj"}
    assert stack_of(model) == compose(with_mxfp4_experts())
    # Negative control: in dense weights of float32 the same change stays.
    assert not merge_lora(adapted(std=2e-3)).lost


def test_without_adapters_there_is_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match=r"no adapters on this GptOssForCausalLM. Put some on it: with_lora"):
        merge_lora(tiny_model())
    with pytest.raises(ValueError, match="no adapters"):
        export(tiny_model(), "nowhere", adapter="apart")
    model = with_lora(tiny_model())
    report = merge_lora(model)
    assert all(found.change == 0 for found in report.weights.values())
    assert torch.equal(model(ids()).logits, tiny_model()(ids()).logits)


@pytest.mark.parametrize("others", [(), (with_mxfp4_experts(),)], ids=["dense", "packed"])
@PLAIN
def test_an_exported_checkpoint_loads_in_plain_transformers(others: tuple[Any, ...], tmp_path: Path) -> None:
    model = adapted(*others, std=1.0, targets=everything(), train=("sinks",))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    merged = undo(copy.deepcopy(model), *others) if others else copy.deepcopy(model)
    merge_lora(merged)
    report = export(model, tmp_path / "bf16", format="bf16")
    assert len(report.weights) == 3 * 7 + 1
    assert_same_weights(plain(tmp_path / "bf16"), merged)
    export(model, tmp_path / "apart", format="bf16", adapter="apart")
    apart = plain(tmp_path / "apart")
    base = tiny_model()
    base.load_state_dict({name: t for name, t in before.items() if "sinks" in name}, strict=False)
    assert_same_weights(apart, base)
    merge_lora(load_adapter(apart, tmp_path / "apart" / "adapter"))
    there = merged.state_dict()
    assert all(relative(tensor, there[name]) < 4e-3 for name, tensor in apart.state_dict().items())
    assert relative(base(ids()).logits, merged(ids()).logits) > 0.5, "the adapters change nothing"
    # The model is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "with_lora" in str(stack_of(model))


@PLAIN
def test_mxfp4_is_written_as_released(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16, std=1.0)
    export(model, tmp_path)
    merge_lora(model)
    with_mxfp4_experts(model)
    written = load_file(tmp_path / "model.safetensors")
    released = of_golden()
    kinds = {(name.rpartition(".")[2], tensor.dtype, tensor.ndim) for name, tensor in written.items()}
    assert kinds == {(name.rpartition(".")[2], tensor.dtype, tensor.ndim) for name, tensor in released.items()}
    theirs = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == theirs
    again, there = load(tmp_path, with_mxfp4_experts()).state_dict(), model.state_dict()
    packed = [name.removesuffix("_blocks") for name in again if name.endswith("_blocks")]
    for name in packed:
        one, other = (unpack(some[f"{name}_blocks"].data, some[f"{name}_scales"].data) for some in (again, there))
        # Merged before it was packed, the other has been rounded to bfloat16 in between.
        assert (one == other).double().mean() > 0.95, name
    assert len(packed) == 6
    assert plain(tmp_path)(ids()).logits.isfinite().all()


def test_an_untouched_packed_model_is_exported_bit_for_bit(tmp_path: Path) -> None:
    model: Any = load(GOLDEN, with_mxfp4_experts(), with_flash_attention())
    report = export(model, tmp_path)
    assert not report.weights
    written, released = load_file(tmp_path / "model.safetensors"), of_golden()
    assert written.keys() == released.keys()
    assert all(torch.equal(tensor, released[name]) for name, tensor in written.items())


def test_files_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    export(tiny_model(), source)
    (source / "tokenizer.json").write_text("{}")
    export(load(source), tmp_path / "again", format="bf16")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


def test_exports_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export: format is 'gguf'. Use one of 'mxfp4', 'bf16'"):
        export(tiny_model(), tmp_path / "no", format="gguf")
    with pytest.raises(ValueError, match="export: adapter is 'none'. Use one of 'merged', 'apart'"):
        export(tiny_model(), tmp_path / "no", adapter="none")
    with pytest.raises(ValueError, match="gate_up_proj cannot be written as 'mxfp4'.* Use format='bf16'"):
        export(GptOssForCausalLM(tiny_config(hidden_size=80)), tmp_path / "no")
    with pytest.raises(ValueError, match=r"would round away.*export\(..., lossy=True\) does it even so"):
        export(adapted(with_mxfp4_experts(), std=2e-3), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def batches(count: int) -> list[Tensor]:
    """Sequences in which each token follows from the one before, and which begin anywhere."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(2, 127, (count, 8, 1), generator=generator)
    return list((starts + 5 * torch.arange(16)) % 125 + 2)


def learned(model: Any, steps: int = 60) -> float:
    """Train what takes gradients, and return the mean of the last losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for batch in batches(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    return sum(losses[-5:]) / 5


@PLAIN
def test_a_task_is_learned_on_packed_weights_merged_exported_and_solved_by_plain_transformers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    torch.manual_seed(0)
    theirs = get_peft_model(
        tiny_model().train(), LoraConfig(**options, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    model = compose(with_mxfp4_experts(), with_flash_attention(), with_lora())(tiny_model()).train()
    reached, expected = learned(model), learned(theirs)
    assert abs(reached / expected - 1) < 0.05, (reached, expected)
    held_out = batches(64)[-1]
    model.eval()
    solved = model(held_out, labels=held_out).loss.item()
    export(model, tmp_path, format="bf16")
    exported = plain(tmp_path)
    assert exported(held_out, labels=held_out).loss.item() == pytest.approx(solved, rel=0.05)
    with adapters_off(model):
        assert model(held_out, labels=held_out).loss.item() > 2 * solved
    undo(model, with_mxfp4_experts)
    merge_lora(model)
    assert model(held_out, labels=held_out).loss.item() == pytest.approx(solved, rel=1e-3)
