from __future__ import annotations

import pytest

from latentmill.plugin import RowError
from latentmill_shapes.draw import all_scenes
from latentmill_shapes.text import LENGTH, PAD, START, VOCABULARY, tokenise


def words(prompt: str) -> list[str]:
    return [VOCABULARY[t] for t in tokenise(prompt) if t not in (PAD, START)]


def test_case_punctuation_and_fillers_do_not_matter() -> None:
    plain = tokenise("a red star left of a blue ring on a yellow background")
    assert (
        words("a red star left of a blue ring on a yellow background")
        == "red star left blue ring on yellow background".split()
    )
    for same in (
        "A RED star, left of the Blue ring -- on a yellow background!",
        "red star to the left of blue ring on yellow background.",
        "  a red\tstar left of a blue ring\non a yellow background ",
    ):
        assert tokenise(same) == plain


def test_every_caption_has_its_own_tokens() -> None:
    scenes = all_scenes()
    assert len({tuple(tokenise(s.caption)) for s in scenes}) == len(scenes)
    assert all(len(tokenise(s.caption)) == LENGTH for s in scenes[::100])


def test_the_empty_prompt_is_start_and_padding() -> None:
    assert tokenise("") == tokenise(" ... ") == [START] + [PAD] * (LENGTH - 1)


def test_out_of_grammar_is_fine_while_every_word_is_known() -> None:
    assert words("yellow background circle red red") == "yellow background circle red red".split()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a rad star", "unknown word 'rad'.*did you mean red"),
        ("a red starr on a blue background", "unknown word 'starr'.*did you mean star"),
        ("a photo of an astronaut", "unknown word 'photo'"),
        ("a <pad> star", "unknown word 'pad'"),
        ("ein blauer Kreis über", "unknown word 'ein'"),
        ("red 青", "unknown word '青'"),
        ("red " * LENGTH, f"{LENGTH} words, {LENGTH - 1} at most"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(prompt: str, expected: str) -> None:
    with pytest.raises(RowError, match=expected):
        tokenise(prompt)


def test_the_longest_prompt_fits() -> None:
    assert PAD not in tokenise("red " * (LENGTH - 1))
