"""Rows of a file become documents, bad ones are named, and packed documents count as if each were alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoss_opt import compose, with_flash_attention, with_full_finetuning
from gptoss_opt.finetune.data import DataError, Row, batches, pack, read_documents, steps_per_pass
from gptoss_opt.finetune.documents import Document, document_of
from gptoss_opt.finetune.options import FinetuneError
from gptoss_opt.wrappers.chunked_loss import with_chunked_loss
from tests.finetune.chats import MARKED, TEMPLATE, assistant, tokenizer, user
from tests.helpers import tiny_model

CHAT = [user("2+2?"), assistant("4"), user("and 1 more?"), assistant("5", thinking="4+1")]


def learnt(row: object, template: str | None = TEMPLATE) -> tuple[str, list[str]]:
    """The text of a row's document, and its stretches that are learnt."""
    known = tokenizer(template)
    document = document_of(row, known)
    stretches: list[list[int]] = [[]]
    for token, learns in zip(document.tokens.tolist(), document.learnt.tolist(), strict=True):
        if learns:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return known.decode(document.tokens), [known.decode(stretch) for stretch in stretches if stretch]


def lines(path: Path, *rows: object) -> Path:
    """A file of rows; those that are bytes as they are."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_of_a_text_everything_is_learnt() -> None:
    assert learnt({"text": "abc", "id": 7}) == ("abc<|return|>", ["abc<|return|>"])


def test_of_a_completion_the_prompt_is_not_learnt() -> None:
    assert learnt({"prompt": "2+2=", "completion": "4"}) == ("2+2=4<|return|>", ["4<|return|>"])


def test_of_a_chat_the_turns_of_the_assistant_are_learnt() -> None:
    whole, stretches = learnt({"messages": CHAT})
    assert stretches == ["!<|message|>4<|end|>", "~<|message|>4+1<|end|><|start|>assistant!<|message|>5<|return|>"]
    assert whole == tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert (
        document_of({"messages": CHAT}, tokenizer()).tokens.tolist()
        == tokenizer().apply_chat_template(CHAT)["input_ids"]
    )
    # What comes after the assistant's last turn is not.
    assert learnt({"messages": [*CHAT[:2], user("thanks")]})[1] == ["!<|message|>4<|end|>"]


def test_a_template_that_marks_the_assistant_is_taken_at_its_word() -> None:
    whole, stretches = learnt({"messages": CHAT}, MARKED)
    assert stretches == ["!<|message|>4<|end|>", "!<|message|>5<|end|>"]
    # And without its marks it says the same, but for where a turn begins: after the assistant's name.
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain += "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    assert learnt({"messages": CHAT}, plain) == (whole, stretches)


def test_calls_of_tools_are_learnt() -> None:
    chat = [user("2+2?"), {"role": "assistant", "tool_calls": [{"name": "add"}]}, {"role": "tool", "content": '"4"'}]
    whole, stretches = learnt({"messages": [*chat, assistant("4")], "tools": [{"type": "function"}]})
    assert stretches == [" to=add<|call|>", "!<|message|>4<|return|>"]
    assert "<|message|>1 tools<|end|>" in whole


BAD = {
    b"{": r"it is not JSON \(Expecting property name",
    b"\xff\xfe": r"it is not UTF-8",
    b"": "it is empty",
    b'{"text": "\\ud800"}': r"text has half a character \(a lone surrogate\) at 0",
    b"[" * 100_000: "it is not JSON",
    b"[1]": "it is a JSON list, and should be an object",
    b"null": "it is a JSON null, and should be an object",
    b"{}": "it is empty",
    b'{"chat": [], "id": 3}': "its keys are 'chat', 'id'; known are messages, text, prompt and completion",
    b'{"text": "a", "prompt": "b"}': "it has 'text' and 'prompt', and should have one of them",
    b'{"completion": "a"}': "it has no 'prompt'",
    b'{"prompt": "a"}': "it has no 'completion'",
    b'{"text": 3}': "text is a JSON number, and should be a string",
    b'{"text": " "}': "text is empty",
    '{"text": "日本"}'.encode(): "'日本' gives no tokens",
    '{"prompt": "a", "completion": "日"}'.encode(): "'日' gives no tokens",
    b'{"text": "twelve tokens"}': "it has 14 tokens, more than --max-length 12; --truncate cuts such rows",
    b'{"messages": {}}': "messages is a JSON object, and should be a list",
    b'{"messages": []}': "messages is empty",
    b'{"messages": ["hi"]}': "message 1 is a JSON string, and should be an object",
    b'{"messages": [{"content": "hi"}]}': "message 1 has no role",
    b'{"messages": [{"role": "user"}]}': "message 1 has no content",
    b'{"messages": [{"role": "user", "content": []}]}': "the content of message 1 is a JSON list, and should be",
    b'{"messages": [{"role": 1, "content": "a"}]}': "the role of message 1 is a JSON number, and should be a string",
    b'{"messages": [{"role": "user", "content": ""}]}': "the content of message 1 is empty",
    b'{"messages": [{"role": "user", "content": "a"}]}': "it has no message of the assistant",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:30])
def test_bad_rows_are_named_with_the_reason(line: bytes, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"text": "fine"}, line, {"text": "fine"})
    with pytest.raises(DataError, match=rf"data.jsonl: 1 row cannot be trained on:\n  line 2: {BAD[line]}"):
        read_documents(path, tokenizer(), max_length=12)


BAD_CHATS: list[tuple[list[Any], str, str | None]] = [
    (
        [user("a"), {"role": "critic", "content": "b"}, assistant("c")],
        "does not write message 2, whose role is 'critic'",
        TEMPLATE,
    ),
    (
        [user("a"), {"role": "developer", "content": "b"}, assistant("c")],
        "message 2, whose role is 'developer'",
        TEMPLATE,
    ),
    ([user("a"), assistant("<|tag|>")], r"refuses it \(TemplateError: no tags, please\)", TEMPLATE),
    ([assistant("a"), user("b")], "message 1 is the assistant's, and the chat template does not mark", TEMPLATE),
    ([user("a"), assistant("b")], "the tokenizer has no chat template", None),
    (
        [user("a"), assistant("b"), user("c"), assistant("d")],
        "message 2 in another way when more follows",
        "{{ messages|length }}" + TEMPLATE,
    ),
]


@pytest.mark.parametrize(("messages", "reason", "template"), BAD_CHATS, ids=[reason[:30] for _, reason, _ in BAD_CHATS])
def test_chats_that_the_template_does_not_take(
    messages: list[Any], reason: str, template: str | None, tmp_path: Path
) -> None:
    path = lines(tmp_path / "data.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=f"line 1: .*{reason}"):
        read_documents(path, tokenizer(template), max_length=100)


def test_twenty_bad_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    rows = [{"text": "" if number % 2 else "fine"} for number in range(50)]
    with pytest.raises(DataError) as caught:
        read_documents(lines(tmp_path / "data.jsonl", *rows), tokenizer(), max_length=12)
    assert (caught.value.count, len(caught.value.problems)) == (25, 20)
    shown = str(caught.value).splitlines()
    assert shown[1] == "  line 2: text is empty"
    assert shown[20:] == ["  line 40: text is empty", "  and 5 more"]


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, reason in {
        "empty.jsonl": "holds no rows",
        "missing.jsonl": "cannot be read",
        ".": "cannot be read",
    }.items():
        with pytest.raises(FinetuneError, match=reason):
            read_documents(tmp_path / name, tokenizer(), max_length=12)


def test_longer_rows_are_cut_if_asked(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"text": "abcdef"}, {"prompt": "abc", "completion": "d"})
    cut, kept = read_documents(path, tokenizer(), max_length=5, truncate=True)
    assert tokenizer().decode(cut.tokens) == "abcde"
    assert kept.num_labels == 2
    with pytest.raises(DataError, match="line 2: its first 3 of 5 tokens hold nothing that is learnt"):
        read_documents(path, tokenizer(), max_length=3, truncate=True)


@given(st.lists(st.integers(1, 16), max_size=60))
def test_rows_hold_every_document_once_and_fit(lengths: list[int]) -> None:
    documents = [Document.of([number % 7] * length) for number, length in enumerate(lengths)]
    rows = pack(documents, context=16)
    assert sorted(id(document) for row in rows for document in row.documents) == sorted(map(id, documents))
    assert all(row.num_tokens <= 16 for row in rows)
    assert all(a.num_tokens + b.num_tokens > 16 for a, b in pairwise(rows))
    # The same as a search through all rows for the one with the least room.
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 16) - length)
    assert sorted(16 - row.num_tokens for row in rows) == sorted(rooms)


def test_a_document_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="a document has 9 tokens, more than a row of 8"):
        pack([Document.of(range(9))], context=8)


def test_what_a_row_gives_a_model() -> None:
    inputs = Row((Document.of([5, 6, 7], [0, 1, 1]), Document.of([8, 9], [1, 1]))).inputs()
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}


@pytest.mark.parametrize("chunked", [False, True])
def test_packed_rows_have_the_loss_of_separate_documents(chunked: bool) -> None:
    generator = random.Random(0)
    documents = []
    for length in (11, 3, 7, 16, 2, 9):
        tokens = [generator.randrange(2, 127) for _ in range(length)]
        documents.append(Document.of(tokens, [generator.random() < 0.7 or n == length - 1 for n in range(length)]))
    rows = pack(documents, context=16)
    assert len(rows) < len(documents)
    count = sum(document.num_labels for document in documents)

    # Apart, as transformers computes them: the mean over all that is learnt.
    plain = tiny_model()
    apart = sum(
        plain(document.tokens.long()[None], labels=document.labels[None]).loss.item() * document.num_labels / count
        for document in documents
    )
    wrappers = (with_flash_attention(), with_full_finetuning(), *([with_chunked_loss()] if chunked else []))
    model = compose(*wrappers)(tiny_model()).train()

    def together(inputs: Iterable[dict[str, Any]]) -> float:
        return sum(model(**one, num_items_in_batch=count, use_cache=False).loss.item() for one in inputs)

    assert together(row.inputs() for row in rows) == pytest.approx(apart, rel=1e-5)
    # It is another where documents see each other, and where the first token of one is learnt from another.
    merged = [{key: value for key, value in row.inputs().items() if key != "position_ids"} for row in rows]
    assert together(merged) != pytest.approx(apart, rel=1e-3)
    learning_all = [{**row.inputs(), "labels": row.inputs()["input_ids"]} for row in rows]
    assert together(learning_all) != pytest.approx(apart, rel=1e-3)


def test_the_order_of_rows_depends_on_the_seed_alone() -> None:
    rows = [Row((Document.of([token]),)) for token in range(10)]

    def order(seed: int, first: int = 0, num_steps: int = 8) -> list[list[int]]:
        found = batches(rows, 3, num_steps=num_steps, seed=seed, first=first)
        return [[int(row.documents[0].tokens) for row in batch] for batch in found]

    assert steps_per_pass(rows, 3) == 4
    steps = order(0)
    assert [len(step) for step in steps] == [3, 3, 3, 1] * 2
    assert sorted(chain(*steps[:4])) == sorted(chain(*steps[4:])) == list(range(10))
    assert steps[:4] != steps[4:]
    assert steps != order(1)
    for first in range(9):
        assert order(0, first) == steps[first:]
    assert order(0, num_steps=5) == steps[:5]
