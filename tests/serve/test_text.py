"""Text of tokens that come one by one."""

from __future__ import annotations

import random

import pytest

from gptoss_opt.serve import SettledText, StopStrings, pieces


class Bytes:
    """A tokenizer whose tokens are bytes, and 256 a special one."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class Words:
    """A tokenizer that writes a space before each word but the first, as those of SentencePiece do."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_characters_of_several_tokens_are_written_whole() -> None:
    assert list(pieces(Bytes(), "aé!".encode())) == ["a", "é", "!"]
    assert "".join(pieces(Bytes(), b"a\xc3")) == "a\ufffd"
    assert list(pieces(Bytes(), [97, 256, 0xC3, 256, 0xA9])) == ["a", "é"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_text_of_all_tokens(seed: int) -> None:
    numbers = random.Random(seed)
    tokens = [*"aé!日🎉 b".encode(), *numbers.choices(range(257), k=100)]
    numbers.shuffle(tokens)
    for tokenizer in (Bytes(), Words()):
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_token_costs_as_much_in_a_long_text() -> None:
    class Counting(Bytes):
        most = 0

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            self.most = max(self.most, len(tokens))
            return super().decode(tokens, skip_special_tokens)

    tokenizer = Counting()
    text = SettledText(tokenizer)
    for token in b"abc" * 100:
        text.add(token)
    assert tokenizer.most <= 4


def given(strings: list[str], *texts: str) -> tuple[str, bool]:
    stops = StopStrings(strings)
    return "".join(map(stops.add, texts)) + stops.end(), stops.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces(size: int) -> None:
    text = "one two tw three"
    texts = [text[start : start + size] for start in range(0, len(text), size)]
    assert given([], *texts) == (text, False)
    assert given(["two three", "four"], *texts) == (text, False)
    assert given(["tw th"], *texts) == ("one two ", True)
    assert given(["three"], *texts) == ("one two tw ", True)
    assert given(["nowhere", " two"], *texts) == ("one", True)


def test_the_first_stop_string_counts() -> None:
    assert given(["c", "b"], "abc") == ("a", True)


def test_nothing_is_held_back_that_cannot_begin_a_stop_string() -> None:
    stops = StopStrings(["END"])
    assert [stops.add(one) for one in ("a", "E", "N", "x", "E")] == ["a", "", "", "ENx", ""]
    assert stops.end() == "E"
