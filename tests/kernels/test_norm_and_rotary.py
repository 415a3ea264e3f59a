"""Norms and rotary embeddings by the native library are what transformers computes, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, apply_rotary_pos_emb

from gptoss_opt.kernels import native
from gptoss_opt.kernels.norm import is_served, rms_norm
from gptoss_opt.kernels.rotary import is_served as is_rotation_served
from gptoss_opt.kernels.rotary import rotate
from tests.helpers import relative

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

SETS = range(native.library().best + 1)
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of one rounding, in the Frobenius norm."""
dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)
sets = pytest.mark.parametrize("which", SETS, ids=[native.INSTRUCTION_SETS[one] for one in SETS])


@sets
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 2880), (2, 9, 64), (3, 7), (17, 33)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, which: int) -> None:
    torch.manual_seed(0)
    x, norm = 3 * torch.randn(shape).to(dtype), GptOssRMSNorm(shape[-1], eps=1e-5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[-1]).to(dtype))
        weight = norm.weight.to(dtype)
        exact = norm.weight * x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        found = rms_norm(x, weight, 1e-5, instruction_set=which)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert relative(found.double(), exact) < BOUND[dtype]
    # Negative controls: the mean and the weight count.
    assert relative(rms_norm(x, weight, 1.0, instruction_set=which).double(), exact) > 10 * BOUND[dtype]
    assert relative(rms_norm(x, weight.flip(0), 1e-5, instruction_set=which).double(), exact) > 10 * BOUND[dtype]


@dtypes
def test_norm_is_no_further_from_the_truth_than_that_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    norm, x = GptOssRMSNorm(2880).to(dtype), torch.randn(5, 2880).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    with torch.no_grad():
        theirs, ours = norm(x), rms_norm(x, norm.weight, norm.variance_epsilon)
    assert relative(ours.double(), exact) <= 1.01 * relative(theirs.double(), exact)


def test_norm_of_rows_with_gaps() -> None:
    x, weight = torch.randn(4, 128)[:, ::2], torch.randn(64)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))


def test_norm_leaves_to_torch_what_it_cannot_do() -> None:
    x, weight = torch.randn(4, 64), torch.nn.Parameter(torch.randn(64))
    with torch.no_grad():
        assert is_served(x, weight)
        assert not is_served(x, weight[:1])
        assert not is_served(x.double(), weight.double())
        assert not is_served(x.bfloat16(), weight)
        assert not is_served(x[:0], weight)
        assert not is_served(x.to("meta"), weight.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_served(x, weight)
    assert not is_served(x, weight)
    assert is_served(x, weight.detach())


def exactly_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers does it, in float64."""
    return apply_rotary_pos_emb(x.double(), x.double(), cos.double(), sin.double())[0]


@sets
@dtypes
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dim", [64, 16, 6])
def test_rotation(dim: int, rows: int, dtype: torch.dtype, which: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dim).to(dtype).transpose(1, 2)  # as the model views its projections
    angle = torch.randn(rows, 5, dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    found, exact = rotate(x, cos, sin, instruction_set=which), exactly_rotated(x, cos, sin)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert relative(found.double(), exact) < BOUND[dtype]
    gaps = [one.mT.contiguous().mT for one in (cos, sin)]
    assert torch.equal(rotate(x, *gaps, instruction_set=which), found)
    assert relative(rotate(x, cos, -sin, instruction_set=which).double(), exact) > 10 * BOUND[dtype]
    if rows == 2:
        assert relative(rotate(x, cos.flip(0), sin.flip(0), instruction_set=which).double(), exact) > 10 * BOUND[dtype]


def test_rotation_leaves_to_torch_what_it_cannot_do() -> None:
    x, angle = torch.randn(2, 3, 5, 16), torch.randn(2, 5, 8)
    assert is_rotation_served(x, angle, angle)
    assert not is_rotation_served(x, angle[:, :4], angle[:, :4])
    assert not is_rotation_served(x, angle, angle[:1])
    assert not is_rotation_served(x, angle, angle.double())
    assert not is_rotation_served(x[..., ::2], angle[..., :4].contiguous(), angle[..., :4].contiguous())
    assert not is_rotation_served(x[:, :, :0], angle[:, :0], angle[:, :0])
    assert not is_rotation_served(x.requires_grad_(), angle, angle)
