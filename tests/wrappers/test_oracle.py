"""The oracle: what a checkpoint in the released format gives, computed in float64 by an independent implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptoss_opt import with_flash_attention
from tests.helpers import GOLDEN, loss_and_gradients, relative


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def golden() -> torch.nn.Module:
    # Older versions of transformers leave dequantised experts in bfloat16 whatever dtype is asked for.
    return AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).float().eval()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_with_flash_attention(golden, expected, backend: str) -> None:
    model = with_flash_attention(golden, backend=backend)
    input_ids = expected["input_ids"][None]
    assert relative(model(input_ids).logits[0], expected["logits"]) < 1e-5
    loss, gradients = loss_and_gradients(model, input_ids)
    torch.testing.assert_close(loss.double(), expected["loss"][0], rtol=1e-5, atol=0)
    names = [name.removeprefix("grad.") for name in expected if name.startswith("grad.")]
    assert any("sinks" in name for name in names)
    for name in names:
        assert relative(gradients[name], expected[f"grad.{name}"]) < 1e-4, name
    tokens = model.generate(input_ids, max_new_tokens=len(expected["greedy"]), do_sample=False)
    assert tokens[0, input_ids.shape[1] :].tolist() == expected["greedy"].tolist()


def test_the_oracle_would_notice_a_missing_sink(golden, expected) -> None:
    model = with_flash_attention(golden)
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks.fill_(-1e9)
    assert relative(model(expected["input_ids"][None]).logits[0], expected["logits"]) > 1e-3
