"""The limits file: what each form means, and each mistake in the words that the operator reads."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core.conditions import compile_all
from postmeter.core.limits import PLACEHOLDERS, TEXT, Key, KeyPart, Limit, Override, duration_text
from postmeter.core.meters import UNLIMITED
from postmeter.defaults import CONDITION_DEPTH_MAX, LIMITS_MAX, REPLY_CHARS_MAX
from postmeter.errors import ConfigError
from postmeter.limits_document import duration_ms, read_limits
from tests.unit.support import DAY_MS, HOUR_MS, request

EXAMPLE = Path(__file__).parents[2] / "deploy/examples/limits.yaml"


def document(**given: str) -> str:
    """A file with one limit `x` of 200 recipients an hour, but for what is given; what is given as "-" is left out."""
    entries = {"key": "sasl_username", "count": "recipients", "max": "200", "per": "1h", **given}
    if given.get("max", "").startswith("{") and "per" not in given:
        del entries["per"]
    lines = [f"    {name}: {value}" for name, value in entries.items() if value != "-"]
    return "\n".join(["limits:", "  x:", *lines])


def limit(**given: str) -> Limit:
    """The limit of such a file."""
    [read] = read_limits(document(**given), "x.yaml")
    return read


def problems_of(text: str) -> list[str]:
    """What is wrong with a file."""
    try:
        read_limits(text, "x.yaml")
    except ConfigError as error:
        return error.problems
    return []


def holds(match: str, **attributes: object) -> bool:
    """Whether a condition holds for a request."""
    covers = compile_all(limit(match=match).match)
    assert covers is not None
    return covers(request(**attributes))


# --- what is read -----------------------------------------------------------------------------------------------------


def test_the_example_limits_users_and_domains() -> None:
    """200 recipients an hour and 1,000 a day for a user, 2,000 an hour for a domain."""
    assert [
        Limit("per-user", Key((KeyPart("sasl_username"),)), "recipients", {HOUR_MS: 200, DAY_MS: 1000}),
        Limit("per-domain", Key((KeyPart("sasl_domain"),)), "recipients", {HOUR_MS: 2000}),
    ] == read_limits(EXAMPLE.read_text(), "limits.yaml")


def test_the_suggestions_in_the_example_work() -> None:
    """Who removes the # where the file says so has a file that is read."""
    text = re.sub(r"(?m)^( *)#(?! |$)", r"\1", EXAMPLE.read_text())
    user, domain, client, volume = read_limits(text, "limits.yaml")
    assert {"newsletter@example.org", "fair@example.org", "boss@example.org", "stolen@example.org"} == set(
        user.overrides
    )
    assert {"example.org"} == domain.exempt_keys
    assert client.shadow
    assert {DAY_MS: 500_000_000} == volume.windows


def test_a_limit_knows_its_line() -> None:
    """For what lint has to say of it."""
    assert 2 == limit().line


def test_what_is_not_written_has_a_default() -> None:
    """Only key, count and max are required: the rest refuses for a while, and in plain words."""
    assert Limit("x", Key((KeyPart("sasl_username"),)), "recipients", {HOUR_MS: 200}) == limit()
    assert ("defer", TEXT, False) == (limit().action, limit().text, limit().shadow)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sender", "sender"),
        ("[sasl_username, recipient_domain]", "sasl_username,recipient_domain"),
        ("client_address", "client_address/32/64"),
        ("{client_address: {ipv4: 24}}", "client_address/24/64"),
        ("[{client_address: {ipv4: /24, ipv6: /56}}, helo_name]", "client_address/24/56,helo_name"),
    ],
)
def test_keys(text: str, expected: str) -> None:
    """A name, a list of names, or an address with prefix lengths."""
    assert expected == str(limit(key=text).key)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1s", 1_000), ("90s", 90_000), ("90m", 5_400_000), ("1h 30m", 5_400_000), ("24h", DAY_MS), ("7d", 7 * DAY_MS)],
)
def test_windows(text: str, expected: int) -> None:
    """Written as people write them."""
    assert {expected: 200} == limit(per=text).windows
    assert {expected: 5} == limit(max=f"{{{text}: 5}}").windows


@given(st.integers(1, 400 * 86_400))
def test_windows_are_printed_as_they_are_read(seconds: int) -> None:
    """What a message says of a window can be written into the file; beyond two days it is rounded down to the hour."""
    seconds -= seconds % 3_600 if seconds > 48 * 3_600 else 0
    assert seconds * 1_000 == duration_ms(duration_text(seconds * 1_000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 5),
        ("25MB", 25_000_000),
        ("25 mb", 25_000_000),
        ("500kB", 500_000),
        ("1.5GB", 1_500_000_000),
        ("1.001kB", 1_001),
        ("1KiB", 1_024),
        ("1GiB", 1_073_741_824),
        ("100B", 100),
        ("0200", 200),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    """Decimal units are thousands, as disks and mail clients count; those with an i are powers of 1,024."""
    assert {HOUR_MS: expected} == limit(count="bytes", max=text).windows


def test_overrides() -> None:
    """A number, a word, or a mapping with an end and a note; keys are folded as those of requests are."""
    read = limit(overrides="{Big@Example.org: 5000, evil@x: blocked, boss@x: Unlimited, a@x: {1h: 3}}")
    maxes = {key: override.max for key, override in read.overrides.items()}
    hour = {"big@example.org": 5000, "evil@x": 0, "boss@x": UNLIMITED, "a@x": 3}
    assert {key: {HOUR_MS: most} for key, most in hour.items()} == maxes
    several = limit(
        max="{1h: 5, 24h: 50}",
        overrides="{a: {24h: 9}, b: blocked, c: {max: {1h: unlimited}, note: ours, author: kim}}",
    )
    assert {
        "a": Override({DAY_MS: 9}),
        "b": Override({HOUR_MS: 0, DAY_MS: 0}),
        "c": Override({HOUR_MS: UNLIMITED}, note="ours", author="kim"),
    } == several.overrides


def test_remarks() -> None:
    """Of a limit, too: why, and who."""
    read = limit(note="after the break-in", author="kim")
    assert ("after the break-in", "kim") == (read.note, read.author)
    assert ("", "") == (limit().note, limit().author)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-31", datetime(2027, 2, 1, tzinfo=UTC)),
        ("2027-01-31 18:00", datetime(2027, 1, 31, 18, tzinfo=UTC)),
        ("2027-01-31T18:00:00Z", datetime(2027, 1, 31, 18, tzinfo=UTC)),
        ("2027-01-31 18:00+01:00", datetime(2027, 1, 31, 17, tzinfo=UTC)),
    ],
)
def test_overrides_end(text: str, expected: datetime) -> None:
    """A day is the last one of the override, a time its end, in UTC unless it says otherwise."""
    override = limit(overrides=f"{{a: {{max: 5, until: {text}}}}}").overrides["a"]
    assert expected.timestamp() == override.until_s


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("sasl_username", "Alice@Example.ORG", "alice@example.org"),
        ("sasl_domain", "Example.ORG", "example.org"),
        ("client_address", "192.0.2.7", "192.0.2.7"),
        ("client_address", '"::ffff:192.0.2.7"', "192.0.2.7"),
        ("client_address", "2001:DB8:0::1", "2001:db8::/64"),
        ("client_address", "2001:db8::/64", "2001:db8::/64"),
        ("{client_address: {ipv4: 24}}", "192.0.2.7", "192.0.2.0/24"),
        ("[client_address, sender_domain]", '"2001:db8::1,Example.org"', "2001:db8::/64,example.org"),
    ],
)
def test_keys_are_folded_as_requests_are(key: str, text: str, expected: str) -> None:
    """So that an override and an exemption meet the key that is counted, whatever its spelling."""
    read = limit(key=key, overrides=f"{{{text}: 5}}", exempt=f"[{text}]")
    assert [expected] == list(read.overrides) == list(read.exempt_keys)


def test_exempt_takes_keys_and_conditions() -> None:
    """Also one of them without a list, or an empty list."""
    read = limit(exempt="[News@x, {client_address: {cidr: 192.0.2.0/24}, sender_domain: x}]")
    assert {"news@x"} == read.exempt_keys
    assert [["client_address", "sender_domain"]] == [[one.attribute for one in several] for several in read.exempt]
    assert {"news@x"} == limit(exempt="news@x").exempt_keys
    assert limit() == limit(exempt="[]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Reject", "reject"),
        ("hold", "hold"),
        ("'450 4.7.1 {key}: wait'", "450 4.7.1 {key}: wait"),
        ("421 4.7.1 slow down", "421 4.7.1 slow down"),
        ("521 go away", "521 go away"),
        ("REJECT {limit}", "REJECT {limit}"),
        ("defer_if_permit wait", "defer_if_permit wait"),
        ("REDIRECT abuse@example.org", "REDIRECT abuse@example.org"),
        ("'PREPEND X-Over: {limit}'", "PREPEND X-Over: {limit}"),
        ("DUNNO", "DUNNO"),
    ],
)
def test_actions(text: str, expected: str) -> None:
    """The three words in any case, or an action of access(5) as it is."""
    assert expected == limit(on_exceed=text).action


@pytest.mark.parametrize(
    ("match", "yes", "no"),
    [
        ("{sender: A@x}", {"sender": "a@X"}, {"sender": "aa@x"}),
        ("{sender: [a@x, b@x]}", {"sender": "b@x"}, {"sender": "c@x"}),
        ("{sender: [a@x, {glob: '*@y'}]}", {"sender": "c@y"}, {"sender": "c@x"}),
        ("{sender_domain: {glob: '*.X'}}", {"sender": "a@b.x"}, {"sender": "a@x"}),
        ("{sender: {regex: '^(a|b)@'}}", {"sender": "B@x"}, {"sender": "cb@x"}),
        ("{sender: {glob: 'a*', not: a@x}}", {"sender": "a@y"}, {"sender": "a@x"}),
        ("{sender: {not: [a@x, b@x]}}", {"sender": "c@x"}, {"sender": "b@x"}),
        ("{sender: {not: {present: true}}}", {"sender": ""}, {"sender": "a"}),
        ("{sender: {present: no}}", {"sender": ""}, {"sender": "a"}),
        ("{client_address: {cidr: [10.0.0.0/8, 2001:db8::/32]}}", {"client_address": "2001:db8::1"}, {}),
        ("{client_address: {cidr: 192.0.2.7}}", {}, {"client_address": "192.0.2.8"}),
        ("{client_address: 2001:DB8:0::1}", {"client_address": "2001:db8::1"}, {}),
        ("{sender: a, recipient: b}", {"sender": "a", "recipient": "b"}, {"sender": "a", "recipient": "c"}),
        ("{recipient_count: 1}", {}, {"recipient_count": 2}),
    ],
)
def test_conditions(match: str, yes: dict[str, object], no: dict[str, object]) -> None:
    """A value, a list of which one holds, operators that all hold; case does not matter."""
    assert holds(match, **yes)
    assert not holds(match, **no)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A@x", {"a@x"}),
        ("[a, B]", {"a", "b"}),
        ("[a, {equal: [b, c]}]", {"a", "b", "c"}),
        ("{equal: [a, b], glob: 'a*'}", {"a", "b"}),
        ("[{equal: [a, b]}, {present: false}]", {"a", "b", ""}),
        ("[a, {glob: 'b*'}]", None),
        ("{not: a}", None),
    ],
)
def test_conditions_know_their_values(text: str, expected: set[str] | None) -> None:
    """The only values for which a condition can hold, where there is a list of them."""
    assert expected == limit(match=f"{{sender: {text}}}").match[0].values


def test_conditions_remember_what_was_written() -> None:
    """In one line, for those who ask why a limit did not match."""
    written = limit(match="{sender: {not: [a, {glob: 'b*'}]}}").match[0].written
    assert "{not: [a, {glob: b*}]}" == written


# --- what is refused --------------------------------------------------------------------------------------------------

NUMBER = "write a number such as 200, or {1h: 200, 24h: 1000}"
SIZE = "write a size such as 25MB, or {1h: 25MB, 24h: 100MB}"
WINDOW = "write a window such as 90s, 90m, 24h or 7d"
ANSWER = 'write defer, reject, hold, or an action such as "421 4.7.1 slow down"'
PREFIX = "write one such as 192.0.2.0/24 or 2001:db8::/32"
UNTIL = "write a day such as 2027-01-31, or a time such as 2027-01-31 18:00+01:00"
AN_ADDRESS = "write one, or a network such as {cidr: 192.0.2.0/24}"
A_KEY = "write a name such as sasl_username, a list of names, or {client_address: {ipv4: 32, ipv6: 64}}"
BRACES = "write {{ and }} for braces"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # names
        ({"kye": "sender"}, "kye: unknown name; did you mean key?"),
        ({"key": "-"}, ": key is missing; write key: sasl_username"),
        ({"count": "-"}, ": count is missing; write count: recipients"),
        ({"max": "-"}, ": max is missing; write max: {1h: 200, 24h: 1000}"),
        # key
        ({"key": "sasl_usernme"}, 'key: "sasl_usernme" is unknown; did you mean sasl_username?'),
        ({"key": "[sender, sender]"}, "key: names an attribute twice; write each once"),
        ({"key": "[]"}, "key: is an empty list; write at least one value, or remove it"),
        ({"key": "[[sender]]"}, f"key: is a list; {A_KEY}"),
        ({"key": "{sender: {}}"}, "key: sender is no address and has no networks; write just sender"),
        ({"key": "{sender: 1, helo_name: 2}"}, f"key: is a mapping of several names; {A_KEY}"),
        (
            {"key": "{client_address: {ipv4: 33}}"},
            'key.client_address.ipv4: "33" is no prefix length; write the bits of the network, 1 to 32',
        ),
        ({"key": "{client_address: {ip4: 8}}"}, "key.client_address.ip4: unknown name; did you mean ipv4?"),
        # count, max, per
        ({"count": "recipient"}, 'count: "recipient" is unknown; did you mean recipients?'),
        ({"max": "2oo"}, f'max: "2oo" is not a number; {NUMBER}'),
        ({"max": "1,000"}, f'max: "1,000" is not a number; {NUMBER}'),
        ({"max": "1.5"}, f'max: "1.5" is not a number; {NUMBER}'),
        ({"max": "٣"}, f'max: "٣" is not a number; {NUMBER}'),
        ({"max": "-5"}, f'max: "-5" is not a number; {NUMBER}'),
        ({"max": ""}, f"max: is empty; {NUMBER}"),
        ({"max": "[5]"}, f"max: is a list; {NUMBER}"),
        ({"max": "0"}, 'max: "0" is out of range; write 1 to 1000000000000000'),
        ({"max": "9" * 16}, f'max: "{"9" * 16}" is out of range; write 1 to 1000000000000000'),
        ({"max": "25MB"}, 'max: "25MB" is a size, and the limit counts recipients; write a number, or count: bytes'),
        ({"max": "25M", "count": "bytes"}, f'max: "25M" is not a size; {SIZE}'),
        ({"max": "5iB", "count": "bytes"}, f'max: "5iB" is not a size; {SIZE}'),
        ({"per": "-"}, "max: has no window; write per: 1h below it"),
        ({"per": "60"}, f'per: "60" is no length of time; {WINDOW}'),
        ({"per": "1:30"}, f'per: "1:30" is no length of time; {WINDOW}'),
        ({"per": "500d"}, 'per: "500d" is too long; write 1s to 400d'),
        ({"per": "0h"}, 'per: "0h" is too short; write 1s to 400d'),
        ({"max": "{}"}, f"max: is empty; {NUMBER}"),
        ({"max": "{1h: 5, hour: 6}"}, f'max.hour: "hour" is no length of time; {WINDOW}'),
        ({"max": "{1h: 5, 60m: 6}"}, "max.60m: is a window that stands there already; remove one of them"),
        ({"max": "{1h: 5}", "per": "1h"}, "per: stands beside a max that has its own windows; remove it"),
        (
            {"count": "bytes", "key": "recipient_domain"},
            "count: cannot be bytes with recipients in key or conditions: at RCPT the size is only the client's claim;"
            " write recipients or messages, or remove them there",
        ),
        # match
        ({"match": "{}"}, "match: has no condition; write one such as sasl_username: {present: true}, or remove it"),
        ({"match": "sender"}, "match: is not a mapping; write name: value, one below the other and indented alike"),
        ({"match": "{sendr: x}"}, 'match.sendr: "sendr" is no attribute of a request; did you mean sender?'),
        ({"match": "{sender: }"}, "match.sender: is empty; write a value, or {present: false} if there must be none"),
        ({"match": "{sender: []}"}, "match.sender: is an empty list; write at least one value, or remove it"),
        ({"match": "{sender: {globb: x}}"}, "match.sender.globb: unknown name; did you mean glob?"),
        (
            {"match": "{sender: {regex: '('}}"},
            'match.sender.regex: "(" is no regular expression: missing ), unterminated subpattern at position 0;'
            " correct it, or use glob",
        ),
        (
            {"match": "{sender: {present: maybe}}"},
            'match.sender.present: "maybe" is neither true nor false; write true or false',
        ),
        (
            {"match": "{sender: {cidr: 10.0.0.0/8}}"},
            "match.sender.cidr: sender is no address; use glob, or cidr with client_address or server_address",
        ),
        (
            {"match": "{client_address: {cidr: [10.0.0.0/8, 10/8]}}"},
            f'match.client_address.cidr[2]: "10/8" is no network; {PREFIX}',
        ),
        (
            {"match": "{client_address: {cidr: 192.0.2.7/24}}"},
            'match.client_address.cidr: "192.0.2.7/24" has bits set behind its prefix; write 192.0.2.0/24',
        ),
        (
            {"match": "{client_address: {cidr: '::ffff:10.0.0.0/104'}}"},
            'match.client_address.cidr: "::ffff:10.0.0.0/104" never matches, such addresses count as IPv4;'
            " write 10.0.0.0/8",
        ),
        ({"match": "{client_address: 10.0.0.0/8}"}, f'match.client_address: "10.0.0.0/8" is no address; {AN_ADDRESS}'),
        ({"match": "{sender_domain: '@x'}"}, 'match.sender_domain: "@x" is no domain; write what is behind the @'),
        # on_exceed, text
        (
            {"on_exceed": "450"},
            'on_exceed: is digits alone, which Postfix takes for permission; add a text, as in "450 wait"',
        ),
        (
            {"on_exceed": "250 fine"},
            'on_exceed: "250" is no code of a refusal; write 4NN or 5NN and a text, as in "450 wait"',
        ),
        (
            {"on_exceed": "' 450 wait'"},
            f"on_exceed: begins with a space, so that Postfix reads it as names of restrictions; {ANSWER}",
        ),
        ({"on_exceed": ""}, f"on_exceed: is empty; {ANSWER}"),
        (
            {"on_exceed": "OK"},
            "on_exceed: OK ends the list of restrictions, past every check behind it; write DUNNO instead",
        ),
        (
            {"on_exceed": "permit"},
            "on_exceed: permit ends the list of restrictions, past every check behind it; write DUNNO instead",
        ),
        (
            {"on_exceed": "reject_unauth_destination"},
            f'on_exceed: "reject_unauth_destination" is a restriction, which belongs into main.cf; {ANSWER}',
        ),
        ({"on_exceed": "REJCT no"}, 'on_exceed: "REJCT" is no action of access(5); did you mean REJECT?'),
        (
            {"on_exceed": "drop"},
            'on_exceed: "drop" is no action of access(5); write one of BCC, DEFER, DEFER_IF_PERMIT, DEFER_IF_REJECT,'
            " DISCARD, DUNNO, FILTER, HOLD, INFO, PREPEND, REDIRECT, REJECT, WARN",
        ),
        (
            {"on_exceed": "REDIRECT me"},
            'on_exceed: REDIRECT lacks what Postfix needs to do it; write it as in "REDIRECT postmaster@example.org"',
        ),
        (
            {"on_exceed": '"REJECT a\\nb"'},
            'on_exceed: "REJECT a\\nb" has a line break or control character; write one line of plain text',
        ),
        (
            {"on_exceed": "REJECT {who}"},
            'on_exceed: "{who}" is no placeholder; write one of count, key, limit, max, per, used, wait',
        ),
        ({"text": "'{keyy}'"}, 'text: "{keyy}" is no placeholder; did you mean key?'),
        ({"text": "'{key.upper}'"}, 'text: "{key.upper}" is no placeholder; did you mean key?'),
        ({"text": "'{key!r:>9}'"}, 'text: "{key!r:>9}" is no placeholder; did you mean key?'),
        ({"text": "'{}'"}, 'text: "{}" is no placeholder; write one of count, key, limit, max, per, used, wait'),
        ({"text": "'{key'"}, f'text: "{{key" has a brace without its partner; {BRACES}'),
        (
            {"text": "'  '"},
            'text: is empty; write one line such as "{key} has used {used} of {max}, try again in {wait}"',
        ),
        (
            {"text": "x" * (REPLY_CHARS_MAX + 1)},
            f"text: has {REPLY_CHARS_MAX + 1} characters; write at most {REPLY_CHARS_MAX}",
        ),
        (
            {"on_exceed": "REJECT no", "text": "no"},
            "text: is not used beside this on_exceed; put the text into on_exceed, and remove this one",
        ),
        ({"shadow": "maybe"}, 'shadow: "maybe" is neither true nor false; write true or false'),
        # exempt, overrides
        ({"exempt": "['']"}, "exempt[1]: is empty; write a key, or conditions"),
        (
            {"key": "client_address", "exempt": "[example.org]"},
            'exempt[1]: "example.org" is no client_address; write it as the requests have it',
        ),
        (
            {"key": "client_address", "exempt": "[2001:db8::/32]"},
            'exempt[1]: "2001:db8::/32" is not a network that this limit counts; write 2001:db8::/64',
        ),
        (
            {"key": "sasl_domain", "exempt": "['a@b']"},
            'exempt[1]: "a@b" is no sasl_domain; write it as the requests have it',
        ),
        (
            {"key": "[sasl_username, client_address]", "exempt": "[alice]"},
            'exempt[1]: "alice" is not one value each of sasl_username,client_address; write them joined by commas',
        ),
        ({"exempt": "[{sendr: x}]"}, 'exempt[1].sendr: "sendr" is no attribute of a request; did you mean sender?'),
        ({"overrides": "{a: lots}"}, f'overrides.a: "lots" is not a number; {NUMBER}, or unlimited, or blocked'),
        (
            {"overrides": "{a: 5, A: 6}"},
            "overrides.A: is a key that stands there already, in another spelling; remove one of them",
        ),
        ({"overrides": "{a: {24h: 5}}"}, "overrides.a: the limit has no window of 24h; write one of 1h"),
        ({"overrides": "{a: {until: 2027-01-31}}"}, "overrides.a: max is missing; write max: 1000"),
        ({"overrides": "{a: {max: 5, til: x}}"}, "overrides.a.til: unknown name; did you mean until?"),
        ({"overrides": "{a: {max: 5, until: never}}"}, f'overrides.a.until: "never" is no date; {UNTIL}'),
        ({"overrides": "{a: {max: 5, until: 9999-12-31}}"}, f'overrides.a.until: "9999-12-31" is no date; {UNTIL}'),
        (
            {"max": "{1h: 5, 24h: 50}", "overrides": "{a: 9}"},
            "overrides.a: is one number for a limit of several windows; write {1h: 9, 24h: 9}",
        ),
    ],
)
def test_each_mistake_says_what_is_wrong_and_what_would_be_right(given: dict[str, str], expected: str) -> None:
    """One problem for one mistake, with its path, in these words."""
    [problem] = problems_of(document(**given))
    assert f"limits.x{'' if expected.startswith(':') else '.'}{expected}" == re.sub("^x.yaml:[0-9]+: ", "", problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml:1: limits is missing; write limits: and below it, indented, the limits"),
        ("[]", "x.yaml:1: is not a mapping; write name: value, one below the other and indented alike"),
        ("limits: 5", "x.yaml:1: limits: is not a mapping; write name: value, one below the other and indented alike"),
        ("limit: {}\nlimits: {}", "x.yaml:1: limit: unknown name; did you mean limits?"),
        (
            document().replace("  x:", "  Per User:"),
            'x.yaml:2: limits.Per User: "Per User" is no name for a limit; write at most 64 of a-z, 0-9, _ . -'
            " such as per-user",
        ),
        (
            "limits:\n" + "".join(f"  l{number}: {{}}\n" for number in range(LIMITS_MAX + 1)),
            f"x.yaml:1: limits: has {LIMITS_MAX + 1} limits; write at most {LIMITS_MAX}",
        ),
    ],
)
def test_mistakes_around_the_limits(text: str, expected: str) -> None:
    """The outer mapping and the names of limits."""
    assert [expected] == problems_of(text)


def test_no_limits_are_no_mistake() -> None:
    """Also when all of them are commented out."""
    assert [] == read_limits("limits: {}", "x.yaml") == read_limits("limits:\n  # x:\n", "x.yaml")


def test_all_problems_come_at_once_in_the_order_of_lines() -> None:
    """One mistake does not hide another, within a limit or behind it, and each is named with its line."""
    text = document(key="sender_", max="{1h: x, 1d: y}") + "\n  y: {key: 1, count: 2}\n  z:"
    assert [
        'x.yaml:3: limits.x.key: "sender_" is unknown; did you mean sender?',
        f'x.yaml:5: limits.x.max.1h: "x" is not a number; {NUMBER}',
        f'x.yaml:5: limits.x.max.1d: "y" is not a number; {NUMBER}',
        "x.yaml:6: limits.y: max is missing; write max: {1h: 200, 24h: 1000}",
    ] == [problem for problem in problems_of(text) if not problem.startswith(("x.yaml:6: limits.y.", "x.yaml:7"))]


def test_nested_negation_is_bounded() -> None:
    """`not` up to CONDITION_DEPTH_MAX deep, and no further."""
    deep = "{not: " * CONDITION_DEPTH_MAX + "a" + "}" * CONDITION_DEPTH_MAX
    assert holds(f"{{sender: {deep}}}", sender="a")
    [problem] = problems_of(document(match=f"{{sender: {{not: {deep}}}}}"))
    assert problem.endswith(f": not is nested more than {CONDITION_DEPTH_MAX} deep; write it with fewer")


@settings(deadline=None)
@given(st.sampled_from(sorted(PLACEHOLDERS)), st.text("{}kaey !:.[]0", max_size=8))
def test_what_is_taken_as_a_text_can_be_filled_in(name: str, around: str) -> None:
    """A template that was accepted never fails in front of Postfix."""
    try:
        text = limit(text="'{" + name + "}" + around + "'").text
    except ConfigError:
        return
    assert text.format(**dict.fromkeys(PLACEHOLDERS, "1"))


PIECES = (
    "limits: |per-user: |key: |count: |max: |per: |match: |exempt: |overrides: |text: |on_exceed: |sasl_username|"
    "client_address|{ipv4: |recipients|bytes|5|25MB|1h|{1h: |glob: |regex: |cidr: |not: |present: |until: |2027-01-31|"
    "0001-01-01 00:00+23:59|::1|192.0.2.0/24|{|}|[|]|, |\n|  |    |'|\"|(|*|-|#|@|\0|ü"
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES.split("|")), max_size=30).map("".join), st.data())
def test_any_text_is_read_or_refused(text: str, data: st.DataObject) -> None:
    """Nothing but ConfigError is raised, and every problem names the source and a remedy: also for a mutilated file."""
    good = document(max="{1h: 5, 24h: 9}", overrides="{a: {max: {1h: 1}}}", match="{sender: {not: {glob: x}}}")
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(start + 20, len(good))))
    for mutilated in (text, good[:start] + text + good[end:]):
        found = problems_of(mutilated)
        assert all(re.match("x.yaml:[0-9]+: .*; ", problem) for problem in found)
