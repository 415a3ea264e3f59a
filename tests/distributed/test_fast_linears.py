"""Linear layers of few rows on several processes: each computes with the part that it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_opt import shard_tensor_parallel, with_fast_linears
from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.model import linears
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import Ranks
from tests.helpers import few_rows_native, ids, relative, tiny_model

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)


def sharded(off: bool) -> Tensor:
    """Logits of 8 tokens; or of products of which one value is off."""
    real = linears.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_table, "measured", few_rows_native)
        patch.setattr(linears, "product", lambda *args: real(*args) * (1.01 if off else 1))
        with torch.no_grad():
            logits: Tensor = with_fast_linears(shard_tensor_parallel(tiny_model(**UNEVEN)))(ids()[:1, :8]).logits
    return logits


def test_each_rank_computes_with_what_it_holds(ranks: Ranks) -> None:
    exact = tiny_model(**UNEVEN)(ids()[:1, :8]).logits
    for found in ranks(sharded, False):
        assert relative(found, exact) < 1e-5
    # Negative control: it is this that computes.
    for found in ranks(sharded, True):
        assert relative(found, exact) > 1e-3
