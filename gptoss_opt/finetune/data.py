"""Training data: a file of rows, read and checked whole, packed into rows of one length, in batches by seed."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .documents import Document, RowError, document_of
from .options import FinetuneError

MAX_SHOWN = 20
"""How many bad rows are named."""


class DataError(FinetuneError):
    """Rows of a file cannot be trained on.

    Attributes:
        problems: one sentence for each bad row, of the first ones.
        count: how many bad rows there are.
    """

    def __init__(self, path: str | os.PathLike[str], problems: Sequence[str], count: int) -> None:
        self.problems, self.count = tuple(problems), count
        rows = "row" if count == 1 else "rows"
        more = f"\n  and {count - len(problems)} more" if count > len(problems) else ""
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{path}: {count} {rows} cannot be trained on:{lines}{more}")


def read_documents(
    path: str | os.PathLike[str], tokenizer: Any, *, max_length: int, truncate: bool = False
) -> list[Document]:
    """Read a file with one JSON object in each line, and check every one of them.

    What rows look like, and which of their tokens are learnt, is said at `document_of`.

    Args:
        path: the file, in UTF-8.
        tokenizer: of transformers, with an end token.
        max_length: how many tokens a row may have at most.
        truncate: cut longer rows to it, at the end, rather than refuse them.

    Raises:
        DataError: there are bad rows; the first 20 are named by line and reason.
        FinetuneError: the file cannot be read, or holds no rows.
    """
    documents: list[Document] = []
    problems: list[str] = []
    count = 0
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file, tqdm(total=size, desc="reading", unit="B", unit_scale=True, delay=1) as bar:
            for number, line in enumerate(file, 1):
                try:
                    documents.append(_document(line, tokenizer, max_length, truncate))
                except RowError as error:
                    count += 1
                    if count <= MAX_SHOWN:
                        problems.append(f"line {number}: {error}")
                bar.update(len(line))
    except OSError as error:
        raise FinetuneError(f"{path} cannot be read ({error.strerror}). Give a file of JSON lines.") from error
    if problems:
        raise DataError(path, problems, count)
    if not documents:
        raise FinetuneError(f"{path} holds no rows. Give a file with one JSON object in each line.")
    return documents


def _document(line: bytes, tokenizer: Any, max_length: int, truncate: bool) -> Document:
    if not line.strip():
        raise RowError("it is empty")
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"it is not JSON ({error})") from error
    document = document_of(row, tokenizer)
    if len(document) <= max_length:
        return document
    if not truncate:
        raise RowError(f"it has {len(document)} tokens, more than --max-length {max_length}; --truncate cuts such rows")
    if not (short := document.cut(max_length)).num_labels:
        raise RowError(f"its first {max_length} of {len(document)} tokens hold nothing that is learnt")
    return short


@dataclass(frozen=True, eq=False)
class Row:
    """Documents that are computed together, one after the other, without padding."""

    documents: tuple[Document, ...]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return sum(map(len, self.documents))

    @property
    def num_labels(self) -> int:
        """How many tokens are learnt."""
        return sum(document.num_labels for document in self.documents)

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What a model is called with: `input_ids`, `position_ids` and `labels`, int64 [1, T] each.

        Positions restart with each document, by which `with_flash_attention` keeps them apart.

        Example:
            >>> Row((Document.of([7, 8]), Document.of([9, 5, 6]))).inputs()["position_ids"]
            tensor([[0, 1, 0, 1, 2]])
        """
        parts = {
            "input_ids": [document.tokens.long() for document in self.documents],
            "position_ids": [torch.arange(len(document)) for document in self.documents],
            "labels": [document.labels for document in self.documents],
        }
        return {name: torch.cat(tensors)[None].to(device) for name, tensors in parts.items()}


def pack(documents: Sequence[Document], *, context: int) -> list[Row]:
    """Put documents into rows of at most `context` tokens: the longest first, each where it leaves the least room.

    That is best-fit decreasing (Johnson 1974): at most 11/9 of the rows that are needed, and some.

    Example:
        >>> rows = pack([Document.of([5] * length) for length in (2, 6, 3, 5)], context=8)
        >>> [[len(document) for document in row.documents] for row in rows]
        [[6, 2], [5, 3]]
    """
    rows: list[list[Document]] = []
    with_room: dict[int, list[list[Document]]] = {}
    rooms: list[int] = []  # the keys of with_room, sorted
    for document in sorted(documents, key=len, reverse=True):
        if len(document) > context:
            raise ValueError(f"a document has {len(document)} tokens, more than a row of {context}. Cut it.")
        at = bisect.bisect_left(rooms, len(document))
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, row = context, []
            rows.append(row)
        row.append(document)
        left = room - len(document)
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(row)
    return [Row(tuple(row)) for row in rows]


def batches(rows: Sequence[Row], size: int, *, num_steps: int, seed: int, first: int = 0) -> Iterator[list[Row]]:
    """The rows of each step, from step `first` on, in an order that depends on the seed alone.

    Each pass over the rows has another order; the last step of a pass has the rows that are left.

    Args:
        rows: all of them.
        size: how many rows a step has.
        num_steps: how many steps there are.
        seed: a whole number of 0 or more.
        first: the number of the first step to give.

    Example:
        >>> rows = [Row((Document.of([token]),)) for token in range(3)]
        >>> [[row.inputs()["input_ids"].item() for row in batch] for batch in batches(rows, 2, num_steps=3, seed=0)]
        [[2, 0], [1], [2, 1]]
    """
    per_pass, generator = steps_per_pass(rows, size), torch.Generator().manual_seed(seed)
    for start in range(0, num_steps, per_pass):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for step in range(max(start, first), min(start + per_pass, num_steps)):
            index = (step - start) * size
            yield [rows[i] for i in order[index : index + size]]


def steps_per_pass(rows: Sequence[Row], size: int) -> int:
    """How many steps of `size` rows go once over all rows.

    Example:
        >>> steps_per_pass([Row(())] * 5, 2)
        3
    """
    return -(-len(rows) // size)
