"""What an exceeded limit answers, as an operator writes it: `on_exceed` and `text`.

    on_exceed: defer                     # or reject, hold; the answer is then made with `text`
    text: "{limit}: {key} has used {used} of {max}, try again in {wait}"
    on_exceed: "421 4.7.1 {key}: slow down"     # or any action of access(5), sent as it is

Both are one line of at most REPLY_CHARS_MAX characters, in which PLACEHOLDERS are filled in; braces themselves are
doubled. An action that Postfix would take for something else is refused: digits alone and a leading space permit, OK
ends the list of restrictions, and an unknown verb is read as a restriction.
"""

from __future__ import annotations

import re
from string import Formatter

from postmeter.core.limits import ACTIONS, PLACEHOLDERS
from postmeter.defaults import REPLY_CHARS_MAX
from postmeter.documents import Node, RefusedError, nearest, quote, scalar

# The actions of access(5); what some of them need, and an example.
_VERBS = frozenset(
    "REJECT DEFER DEFER_IF_REJECT DEFER_IF_PERMIT HOLD DISCARD REDIRECT BCC FILTER PREPEND WARN INFO DUNNO".split()
)
_NEEDS = {
    "REDIRECT": ("@|{key}", "REDIRECT postmaster@example.org"),
    "BCC": ("@|{key}", "BCC postmaster@example.org"),
    "FILTER": (":", "FILTER smtp:[127.0.0.1]:10025"),
    "PREPEND": ("^[!-9;-~]+:", "PREPEND X-Over-Limit: {limit}"),
}
_RESTRICTION = re.compile("(permit|reject|check|defer|warn_if)_|sleep|static:", re.IGNORECASE)


def read_action(node: Node) -> str:
    """The value of `on_exceed`."""
    right = 'write defer, reject, hold, or an action such as "421 4.7.1 slow down"'
    text = scalar(node, right)
    if text.lower() in ACTIONS:
        return text.lower()
    verb, _, rest = text.partition(" ")
    name = verb.upper()
    if not verb:
        raise RefusedError("begins with a space, so that Postfix reads it as names of restrictions", right)
    if verb.isdigit():
        _check_code(verb, rest)
    elif name in ("OK", "RELAY", "PERMIT"):
        raise RefusedError(f"{verb} ends the list of restrictions, past every check behind it", "write DUNNO instead")
    elif name not in _VERBS and _RESTRICTION.match(verb):
        raise RefusedError(f"{quote(verb)} is a restriction, which belongs into main.cf", right)
    elif name not in _VERBS:
        raise RefusedError(f"{quote(verb)} is no action of access(5)", nearest(verb, _VERBS))
    elif name in _NEEDS and not re.search(_NEEDS[name][0], rest):
        raise RefusedError(f"{verb} lacks what Postfix needs to do it", f'write it as in "{_NEEDS[name][1]}"')
    return _template(text)


def _check_code(verb: str, rest: str) -> None:
    if not re.fullmatch("[45][0-9][0-9]", verb):
        raise RefusedError(f"{quote(verb)} is no code of a refusal", 'write 4NN or 5NN and a text, as in "450 wait"')
    if not rest.strip():
        raise RefusedError("is digits alone, which Postfix takes for permission", f'add a text, as in "{verb} wait"')


def read_template(node: Node) -> str:
    """The value of `text`."""
    right = 'write one line such as "{key} has used {used} of {max}, try again in {wait}"'
    if not scalar(node, right).strip():
        raise RefusedError("is empty", right)
    return _template(scalar(node, right))


def _template(text: str) -> str:
    """A text in which only known placeholders stand."""
    if not text.isprintable():
        raise RefusedError(f"{quote(text)} has a line break or control character", "write one line of plain text")
    if len(text) > REPLY_CHARS_MAX:
        raise RefusedError(f"has {len(text)} characters", f"write at most {REPLY_CHARS_MAX}")
    try:
        parsed = list(Formatter().parse(text))
    except ValueError:
        raise RefusedError(f"{quote(text)} has a brace without its partner", "write {{ and }} for braces") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            written = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
            raise RefusedError(f"{quote(written)} is no placeholder", nearest(re.split(r"\W", name)[0], PLACEHOLDERS))
    return text
