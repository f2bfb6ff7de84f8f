"""A name in a table finds the file that it means, and no other one."""

import unicodedata

import pytest

from sslcells.config import ConfigError
from sslcells.data._names import check_classes, respelt, tidy
from sslcells.data._sources import look_up_sources

NFC, NFD = (unicodedata.normalize(form, "Müller/zelle_é.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("a\\b\\c.png", "a/b/c.png"),
        (".\\a\\.\\b.png", "a/b.png"),
        ("/data//x.png", "/data/x.png"),
        ("../x.png", "../x.png"),
    ],
)
def test_tidy(path, expected):
    assert tidy(path) == expected


@pytest.mark.parametrize(
    ("wanted", "there", "expected"),
    [
        ([NFC], [NFD], {NFC: NFD}),
        ([NFD], [NFC], {NFD: NFC}),
        (["a\\1.png"], ["a/1.png"], {"a\\1.png": "a/1.png"}),
        (["A/1.PNG"], ["a/1.png"], {"A/1.PNG": "a/1.png"}),
        (["a.png"], ["a.png", "A.png"], {}),  # as it stands
        (["a.PNG"], ["a.png", "A.png"], {}),  # two could be meant
        (["a.PNG", "A.png"], ["a.png"], {}),  # two mean one
        (["a.png", "A.png"], ["a.png"], {}),  # its only match is taken
        (["b.png"], ["a.png"], {}),
        ([NFC.upper()], [NFD], {NFC.upper(): NFD}),
    ],
)
def test_spellings(wanted, there, expected):
    assert respelt(wanted, there) == expected
    assert respelt(wanted, dict.fromkeys(there)) == expected


def test_sources_find_images_however_they_are_spelt():
    images = [NFD, "slide/1.png", "slide/2.png", "X.png", "x.png"]
    table = {NFC: "m", "Slide/1.PNG": "s", "slide/2.png": "t", "x.png": "u"}
    assert look_up_sources(images, table, None) == ["m", "s", "t", None, "u"]


@pytest.mark.parametrize(
    "pair", [("Mono", "mono"), ("mono ", "mono"), ("Zelle é", unicodedata.normalize("NFD", "zelle É"))]
)
def test_classes_that_differ_in_spelling_are_one_too_many(pair):
    with pytest.raises(ConfigError, match="differ only in spelling"):
        check_classes(["other", *pair], "data.path=x")
    check_classes(["mono", "mono2"], "x")
