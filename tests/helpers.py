"""Small models, comparisons and the error budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from gptoss_opt.core import WRAPPERS
from gptoss_opt.kernels.attention import Rules, Visible
from gptoss_opt.kernels.attention.impl.reference import reference_attention
from gptoss_opt.kernels.kernel_table import LINEARS, Ranges
from gptoss_opt.kernels.mxfp4 import pack, unpack

GOLDEN = Path(__file__).parent / "golden" / "small"
WINDOW = 8


def tiny_config(**changes: Any) -> GptOssConfig:
    """Three layers (sliding, full, sliding), window 8, 8 query and 2 key/value heads."""
    settings = {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "sliding_window": WINDOW,
        "max_position_embeddings": 131072,
        "pad_token_id": 0,
        "eos_token_id": 127,
        "bos_token_id": 1,
        "initializer_range": 0.2,
    }
    return GptOssConfig(**{**settings, **changes})


def tiny_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, kind: type[PreTrainedModel] = GptOssForCausalLM, **changes: Any
) -> Any:
    """A random model in eager attention whose sinks and outputs are far from zero, and whose experts fit into MXFP4."""
    torch.manual_seed(seed)
    model = kind(tiny_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
            elif name.endswith(("gate_up_proj", "down_proj")):
                parameter.copy_(unpack(*pack(parameter.mT)).mT)
            elif name.endswith("_proj_bias"):
                parameter.normal_(std=0.2)
    return model


def ids(batch: int = 2, length: int = 21, seed: int = 1) -> Tensor:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 127, (batch, length), generator=generator)


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def local(tensor: Tensor) -> Tensor:
    """A tensor, or what this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient (or of this rank's part of it) by parameter name; the gradients are cleared."""
    found = {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_and_gradients(model: torch.nn.Module, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of predicting the input, and every gradient."""
    labels = kwargs.pop("labels", input_ids)
    loss = model(input_ids, labels=labels, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def differentiate(run: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def assert_within_budget(
    run: Callable[..., Tensor], inputs: list[Tensor], visible: Visible, scale: float, window: int | None
) -> None:
    """`run(q, k, v, sinks)` and its gradients are as good as plain attention in the dtype of the inputs."""
    d_out = torch.randn_like(inputs[0])

    def plain(*x: Tensor) -> Tensor:
        return reference_attention(*x, Rules(scale, window, visible))

    truth = differentiate(plain, [x.double() for x in inputs], d_out)
    # Nobody trains through one query, whose few gradients say little about rounding: they are tested in float64.
    names = ("out", "dq", "dk", "dv", "dsinks") if inputs[0].shape[2] > 1 else ("out",)
    assert_as_exact(names, differentiate(run, inputs, d_out), differentiate(plain, inputs, d_out), truth)


def assert_as_exact(names: Iterable[str], ours: list[Tensor], base: list[Tensor], truth: list[Tensor]) -> None:
    """Our tensors are as good as those of a plain computation in the same dtype, `base`.

    Allowed is twice the plain computation's own error plus a rounding of the largest value, pointwise and as root mean
    square. The truth is in float64, on the same inputs.
    """
    for name, actual, low, exact in zip(names, ours, base, truth, strict=False):
        assert actual.dtype == low.dtype, name
        assert actual.isfinite().all(), name
        eps = torch.finfo(actual.dtype).eps
        norms: dict[str, Callable[[Tensor], Tensor]] = {
            "pointwise": lambda x: x.abs().max(),
            "rms": lambda x: x.pow(2).mean().sqrt(),
        }
        for kind, norm in norms.items():
            error, allowed = norm(actual.double() - exact), 2 * (norm(low.double() - exact) + eps * exact.abs().max())
            assert error <= allowed, f"{name} {kind}: error {error:.3g}, allowed {allowed:.3g}"


def names_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every wrapper a name that sorts the other way round: nothing may rest on the alphabet."""
    for number, (name, wrapper) in enumerate(sorted(WRAPPERS.items(), reverse=True)):
        monkeypatch.setattr(wrapper, "name", f"{number:02d}:{name}")
        monkeypatch.setitem(WRAPPERS, wrapper.name, wrapper)


@contextmanager
def group_of_one() -> Iterator[None]:
    """Meanwhile, this process is a process group by itself: what shards, shards into one part."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def few_rows_native(most: int = 8) -> dict[tuple[str, torch.dtype], Ranges]:
    """What `kernel_table.measured` says where the native linear layers are faster up to so many rows."""
    dtypes = (torch.float32, torch.bfloat16)
    return {(name, dtype): ((most, "native"), (None, "torch")) for name in LINEARS for dtype in dtypes}


def _kind(name: str) -> str:
    """As a reader of the names would say."""
    if "lora_" in name:
        return "adapters"
    if "experts" in name:
        return "experts"
    if "self_attn" in name:
        return "attention"
    return "embedding and head" if "embed" in name or "lm_head" in name else "router and norms"


def held_by_kind(model: torch.nn.Module) -> dict[str, int]:
    """The bytes of a model's parameters on this rank, by what their names say."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "_local_tensor", parameter)
        found[_kind(name)] += local.nbytes
    return dict(found)
