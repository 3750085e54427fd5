"""YAML with lines: what is taken, what is refused and in which words, with both of PyYAML's loaders."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from postmeter import documents
from postmeter.defaults import FILE_BYTES_MAX
from postmeter.documents import (
    DEPTH_MAX,
    PROBLEMS_MAX,
    Node,
    Plain,
    Problems,
    attempt,
    boolean,
    choice,
    compose,
    decode,
    fields,
    listed,
    mapping,
    nearest,
    plain,
    quote,
    read_text,
    scalar,
    to_yaml,
)
from postmeter.errors import ConfigError

LOADERS = [yaml.SafeLoader, *([yaml.CSafeLoader] if hasattr(yaml, "CSafeLoader") else [])]


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loader in turn."""
    monkeypatch.setattr(documents, "_LOADER", request.param)


def problems_of(text: str) -> list[str]:
    """What `compose` complains of."""
    problems = Problems("x.yaml")
    try:
        compose(text, problems)
    except ConfigError as error:
        return error.problems
    return problems.error().problems


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# only a comment", {}),
        ("a: {b: [c, d]}", {"a": {"b": ["c", "d"]}}),
        ('{"max": 200, "per": "1h"}', {"max": "200", "per": "1h"}),
        ("x: 1:30", {"x": "1:30"}),
        ("on: off", {"on": "off"}),
        ("x: 0660", {"x": "0660"}),
        ("x: 2027-01-31", {"x": "2027-01-31"}),
        ("x: 1_000", {"x": "1_000"}),
        ("x: ~", {"x": "~"}),
        ("x:", {"x": ""}),
        ("x: 'a: b'\r\ny: c\r\n", {"x": "a: b", "y": "c"}),
        ("fe80::1: x", {"fe80::1": "x"}),
    ],
)
def test_a_scalar_is_the_text_that_was_written(text: str, expected: object) -> None:
    """No guessing of types: times, octal numbers, dates and truth values stay text."""
    assert expected == plain(compose(text, Problems("x.yaml")))


@pytest.mark.usefixtures("loader")
def test_values_know_their_lines_and_paths() -> None:
    """A value's line is that of its name, its path leads from the root, items are counted from one."""
    root = compose("limits:\n  per-user:\n    exempt:\n    - a\n    - {b: c}\n", Problems("x.yaml"))
    exempt = mapping(mapping(mapping(root)["limits"])["per-user"])["exempt"]
    second = listed(exempt)[1]
    assert (3, "limits.per-user.exempt") == (exempt.line, exempt.path)
    assert (5, "limits.per-user.exempt[2]") == (second.line, second.path)
    assert "limits.per-user.exempt[2].b" == mapping(second)["b"].path


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: a: stands twice, first in line 1; remove one of them"),
        (
            "a: &x 1",
            "x.yaml:1: a: is a YAML anchor (&), which is not used here; remove it, or write text in quotes",
        ),
        (
            "a:\n  <<: *x",
            "x.yaml:2: a.<<: is a YAML alias (*), which is not used here; write the value out, or text in quotes",
        ),
        (
            "a: !!int 1",
            "x.yaml:1: a: is a YAML tag (!), which is not used here; remove it, or write text in quotes",
        ),
        ("a: 1\n---\nb: 1", "x.yaml:1: has a second document behind ---; keep one of them"),
        (
            "a: 1\n[b]: 1",
            "x.yaml:2: has a list or a mapping for a name; write name: value, and names with brackets in quotes",
        ),
        ("a:\n\tb: 1", "x.yaml:2: is indented with a tab; indent with spaces"),
        ("a: 1\nb: \x07", 'x.yaml:2: contains the control character "\\x07"; remove it'),
        ("a: \ud800", 'x.yaml:1: contains the control character "\\ud800"; remove it'),
    ],
)
def test_what_is_refused_is_named_with_its_line(text: str, expected: str) -> None:
    """Each thing that YAML has and this reader has not, in words that do not depend on the loader."""
    assert [expected] == problems_of(text)


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "a: @x", "a: *@example.org", 'a: "x', "a: {b} c", "- a\nb: c", 'a: "\\UFFFFFFFF"', "%"]
)
def test_what_is_not_yaml_is_refused_with_a_remedy(text: str) -> None:
    """The loader's own words, behind the line and before what usually helps."""
    [problem] = problems_of(text)
    assert problem.startswith(("x.yaml:1: is not YAML: ", "x.yaml:2: is not YAML: "))
    assert problem.endswith(
        '; indent with spaces, and quote text that begins with one of * & ! % @ { [ or contains ": "'
    )


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_before_it_hurts(opening: str) -> None:
    """A hundred thousand levels end in a problem, not in a stack overflow of libyaml or minutes of parsing."""
    assert (
        f"is nested more than {DEPTH_MAX} levels deep; write it with fewer levels" in problems_of(opening * 100_000)[-1]
    )


def test_all_problems_come_at_once_and_in_order() -> None:
    """Structure and values are reported together, by line."""
    problems = Problems("x.yaml")
    entries = fields(compose("b: maybe\na: &x 1\nb: 2\nc: 3", problems), ("a", "b"), {"d": "d: 4"})
    attempt(entries["b"], boolean, False)
    assert [
        "x.yaml:1: d is missing; write d: 4",
        'x.yaml:1: b: "maybe" is neither true nor false; write true or false',
        "x.yaml:2: a: is a YAML anchor (&), which is not used here; remove it, or write text in quotes",
        "x.yaml:3: b: stands twice, first in line 1; remove one of them",
        "x.yaml:4: c: unknown name; write one of a, b",
    ] == problems.error().problems


def test_the_number_of_problems_is_bounded() -> None:
    """Beyond PROBLEMS_MAX they are only counted."""
    problems = problems_of("a: 1\n" * (PROBLEMS_MAX + 8))
    assert PROBLEMS_MAX + 1 == len(problems)
    assert "x.yaml: 7 more problems; correct these first" == problems[-1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a: 1\nb: \xff", "x.yaml:2: is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "x.yaml:1: is not UTF-8; save the file as UTF-8"),
        (b" " * (FILE_BYTES_MAX + 1), f"x.yaml: is larger than {FILE_BYTES_MAX} bytes; make it smaller"),
    ],
)
def test_only_utf8_of_a_bounded_size_is_read(data: bytes, expected: str) -> None:
    """Another encoding and a file that is too large are refused."""
    with pytest.raises(ConfigError) as caught:
        decode(data, "x.yaml")
    assert [expected] == caught.value.problems


def test_a_byte_order_mark_is_ignored() -> None:
    """Some editors write one."""
    assert "a: ü" == decode(b"\xef\xbb\xbfa: \xc3\xbc", "x.yaml")


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """A missing file and a directory are the operator's mistake."""
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            read_text(path)
        expected = f"{path}: cannot be read ({why}); name a file that exists and that this user may read"
        assert [expected] == caught.value.problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[a]", "is a list; write it"), ("{a: b}", "is a mapping; write it"), ("''", "is empty; write it")],
)
def test_a_scalar_is_one_value(text: str, expected: str) -> None:
    """What is no scalar says what it is."""
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        scalar(compose(text, Problems("x.yaml")), "write it")


@pytest.mark.parametrize("text", ["true", "True", "yes", "on"])
def test_truth_has_several_spellings(text: str) -> None:
    """Those of YAML 1.1, as in other configuration files."""
    assert boolean(compose(text, Problems("x.yaml")))


def test_words_are_taken_in_any_case_and_unknown_ones_get_the_nearest() -> None:
    """A typing error is met with the word that was meant, anything else with all of them."""
    reader = choice(("messages", "recipients", "bytes"))
    assert "recipients" == reader(compose("Recipients", Problems("x.yaml")))
    with pytest.raises(ConfigError, match=r'^"recipient" is unknown; did you mean recipients\?$'):
        reader(compose("recipient", Problems("x.yaml")))
    assert "write one of bytes, messages, recipients" == nearest(
        "potatoes-per-day", ("messages", "recipients", "bytes")
    )


def test_values_are_quoted_short_and_on_one_line() -> None:
    """What an operator wrote cannot break a log line."""
    assert '"a\\nb\\u202e"' == quote("a\nb\u202e")
    assert f'"{"x" * 60}..."' == quote("x" * 61)


@given(st.text() | st.text("ab1:-?[]{},&*!|>'\"%@ \n\t#\\xUF<~\ud800\x85\ufeff"))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but ConfigError is raised, whatever the text, and every problem has a source, a line and a remedy."""
    assert all(re.match("x.yaml:[0-9]+: .*; ", problem) for problem in problems_of(text))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('abc:#-{}[]\u00e9\\"\n\t '),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab: {"), inner, max_size=3),
    max_leaves=8,
)


PLAIN = st.recursive(
    st.text() | st.sampled_from(["1h", "true", "~", "- x", "a: b", "a #b", "*x", "a ", "1:30"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("ab"), JSON, max_size=3), st.booleans())
def test_json_is_read_like_yaml(value: object, escaped: bool) -> None:
    """The quick way gives the same values and paths as the long one, which a line break before it forces."""
    text = json.dumps(value, ensure_ascii=escaped)
    quick, long = (compose(each, Problems("x.yaml")) for each in (text, "\n" + text))
    assert [(path, plain(node)) for path, node in nodes(long)] == [(path, plain(node)) for path, node in nodes(quick)]
    assert {1} == {node.line for _, node in nodes(quick)}


@given(st.dictionaries(st.text("ab: #,'[]{}\u00e9\n\x00\u2028\U0001f600"), PLAIN, max_size=3))
def test_what_is_written_is_read_again(value: dict[str, Plain]) -> None:
    """Whatever it has in it."""
    problems = Problems("x.yaml")
    assert value == plain(compose(to_yaml(value), problems))
    problems.check()


def test_what_is_written_looks_like_what_people_write() -> None:
    """One entry a line, quotes only where they are needed."""
    text = 'key: sasl_username\nmax: {1h: 200, 24h: 25MB}\nexempt: [a@example.org, "*@b", ""]\nnote: "a \\"b\\": c"\n'
    assert text == to_yaml(cast(dict[str, Plain], plain(compose(text, Problems("x.yaml")))))


def test_json_has_characters_that_yaml_cannot_escape() -> None:
    """Programs write them so. Half of one is none."""
    assert {"a": "\U0001f600"} == plain(compose('{"a": "\\ud83d\\ude00"}', Problems("x.yaml")))
    assert [] != problems_of('{"a": "\\ud83d"}')


def nodes(node: Node) -> Iterator[tuple[str, Node]]:
    """A node and all below it, with their paths."""
    yield node.path, node
    inner = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    for each in inner:
        yield from nodes(each)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', '{"a": 1}}', "{" + '"a": {' * 60])
def test_json_that_is_wrong_is_refused_like_yaml(text: str) -> None:
    """In the same words."""
    long = [re.sub("(line |:)2", r"\g<1>1", problem) for problem in problems_of("\n" + text)]
    assert long == problems_of(text) != []


@given(st.binary())
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    """The same for bytes."""
    with contextlib.suppress(ConfigError):
        compose(decode(data, "x.yaml"), Problems("x.yaml"))
