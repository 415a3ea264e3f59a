"""How the demo measures a model that several processes hold together, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from ..core import compose
from ..wrappers.expert_parallel import shard_experts
from ..wrappers.tensor_parallel import shard_tensor_parallel
from .decode import Decoder
from .measure import Wrap
from .report import ShardedResult

# torch does not declare all that it has in them.
distributed: Any = torch.distributed
multiprocessing: Any = torch.multiprocessing


def shard_both(model: Any = None) -> Any:
    """Attention by tensor parallelism, experts by expert parallelism, on the same ranks."""
    stack = compose(shard_tensor_parallel(), shard_experts())
    return stack if model is None else stack(model)


SHARDED_ROWS: tuple[tuple[str, Wrap], ...] = (
    ("shard_tensor_parallel", shard_tensor_parallel),
    ("shard_experts", shard_experts),
    ("both", shard_both),
)


def measure_sharded(ranks: int, label: str, wrap: Wrap | None, file: Path, *args: Any) -> ShardedResult:
    """One row: in `ranks` processes, or in one if there is no wrapper; `args` are path, dtype, threads and new tokens.

    The first row writes its outputs to `file`, and the others are compared with that.
    """
    store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    processes = ranks if wrap else 1
    multiprocessing.spawn(_on_rank, (store.port, processes, label, wrap, file, *args), nprocs=processes)
    result: ShardedResult = torch.load(file.with_suffix(".result"), weights_only=False)
    return result


def _on_rank(
    rank: int,
    port: int,
    ranks: int,
    label: str,
    wrap: Wrap | None,
    file: Path,
    path: str,
    dtype: torch.dtype,
    threads: int | None,
    new_tokens: int,
) -> None:
    # Several ranks share the cores.
    torch.set_num_threads(threads or max(torch.get_num_threads() // ranks, 1))
    gpus = torch.cuda.device_count() >= ranks
    if gpus:
        torch.cuda.set_device(rank)
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    decoder = Decoder(path, dtype, label, wrap or _as_it_is, None, device)
    found = decoder.measure(new_tokens, file)
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in decoder.model.parameters()]
    held = sum(parameter.nbytes for parameter in parameters)
    if rank == 0:
        result = ShardedResult(
            f"{label}, {ranks} ranks" if wrap else "one process",
            found.new_tokens,
            found.same_tokens,
            found.logit_difference,
            found.problems,
            held / 2**20,
            found.tokens_per_second,
        )
        torch.save(result, file.with_suffix(".result"))
    distributed.barrier()
    distributed.destroy_process_group()


def _as_it_is(model: Any = None) -> Any:
    return compose() if model is None else model
