"""Regular expressions of a config, matched without backtracking: the pattern comes from a download.

A node maps positions of the text to the positions where it may end, and each pair of node and position is worked out
once, so a match costs at most the length of the pattern times the square of that of the text.
"""

import functools
import re
import string
from collections.abc import Callable

LONGEST = 1000  # characters
_MOST_REPEATS = 1000
_MOST_QUANTIFIERS = 30
_DEEPEST = 20  # groups inside groups

Ends = Callable[[str, int], frozenset[int]]
_CLASSES = {"d": string.digits, "w": string.ascii_letters + string.digits + "_", "s": string.whitespace}


@functools.lru_cache(maxsize=1 << 16)
def matches(pattern: str, text: str) -> bool:
    """Whether `re.match` would find the pattern at the beginning of the text.

    Raises:
        ValueError: the pattern is none, is longer than 1000 characters, or has syntax whose cost is not bounded:
            back-references, look-behind, flags, names of groups.
    """
    return bool(_compiled(pattern)(text, 0))


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> Ends:
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; it must have at most {LONGEST}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is not a regular expression: {error}") from None
    parser = _Parser(pattern)
    found = parser.alternatives(0)
    assert parser.at == len(pattern), "re accepted the pattern, so its groups are closed"
    return _remembered(found)


def _remembered(node: Ends) -> Ends:
    """Works out each position of a text once; the cache holds one text at a time."""
    known: dict[int, frozenset[int]] = {}
    of: list[str] = [""]

    def ends(text: str, start: int) -> frozenset[int]:
        if of[0] != text:
            of[0] = text
            known.clear()
        if start not in known:
            known[start] = node(text, start)
        return known[start]

    return ends


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.quantifiers = pattern, 0, 0

    def next(self) -> str:
        return self.pattern[self.at] if self.at < len(self.pattern) else ""

    def refuse(self, what: str) -> ValueError:
        return ValueError(
            f"it has {what} at character {self.at}; it may have literals, ., classes, groups, |, *, +, ?, {{}}, ^, $ "
            "and look-ahead"
        )

    def alternatives(self, depth: int) -> Ends:
        if depth > _DEEPEST:
            raise self.refuse(f"groups more than {_DEEPEST} deep")
        branches = [self.sequence(depth)]
        while self.next() == "|":
            self.at += 1
            branches.append(self.sequence(depth))
        if len(branches) == 1:
            return branches[0]
        return lambda text, start: frozenset[int]().union(*(branch(text, start) for branch in branches))

    def sequence(self, depth: int) -> Ends:
        parts: list[Ends] = []
        while self.next() and self.next() not in "|)":
            parts.append(self.repeated(self.atom(depth)))

        def ends(text: str, start: int) -> frozenset[int]:
            reached = frozenset([start])
            for part in parts:
                reached = frozenset[int]().union(*(part(text, position) for position in reached))
            return reached

        return ends

    def repeated(self, node: Ends) -> Ends:
        counts = re.compile(r"\*|\+|\?|\{(\d*)(,?)(\d*)\}").match(self.pattern, self.at)
        if counts is None or counts.group() == "{}" or counts.group() == "{,}":
            return node
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(counts.group(), (None, None))
        if low is None:
            low = int(counts.group(1) or 0)
            high = low if not counts.group(2) else int(counts.group(3)) if counts.group(3) else None
        if max(low, high or 0) > _MOST_REPEATS:
            raise self.refuse(f"a count of more than {_MOST_REPEATS}")
        self.at = counts.end()
        self.quantifiers += 1
        if self.quantifiers > _MOST_QUANTIFIERS:
            raise self.refuse(f"more than {_MOST_QUANTIFIERS} quantifiers")
        if self.next() == "?":  # lazy: the same texts match
            self.at += 1
        elif self.next() == "+":
            raise self.refuse("a possessive quantifier")
        inner, least, most = _remembered(node), low, high

        def ends(text: str, start: int) -> frozenset[int]:
            reached = frozenset([start])
            for _ in range(least):
                reached = frozenset[int]().union(*(inner(text, position) for position in reached))
            found, count = reached, least
            while reached and (most is None or count < most):
                reached = frozenset[int]().union(*(inner(text, position) for position in reached)) - found
                found, count = found | reached, count + 1
            return found

        return _remembered(ends)

    def atom(self, depth: int) -> Ends:
        character = self.next()
        if character == "(":
            return self.group(depth)
        self.at += 1
        if character == "^":
            return lambda text, start: frozenset([start] if start == 0 else [])
        if character == "$":
            return lambda text, start: frozenset([start] if text[start:] in ("", "\n") else [])
        if character == ".":
            return _one(lambda c: c != "\n")
        if character == "[":
            return self.set_of_characters()
        if character == "\\":
            return self.escape()
        return _one(lambda c: c == character)

    def group(self, depth: int) -> Ends:
        start = self.at
        kind = next((k for k in ("(?:", "(?=", "(?!", "(?") if self.pattern.startswith(k, start)), "(")
        if kind == "(?":
            raise self.refuse("a group with flags, a name or look-behind")
        self.at += len(kind)
        inner = _remembered(self.alternatives(depth + 1))
        self.at += 1  # the closing parenthesis
        if kind in ("(?=", "(?!"):
            return lambda text, at: frozenset([at] if bool(inner(text, at)) == (kind == "(?=") else [])
        return inner

    def escape(self) -> Ends:
        letter = self.next()
        self.at += 1
        if letter.lower() in _CLASSES:
            members = _CLASSES[letter.lower()]
            return _one(lambda c: (c in members) == letter.islower())
        if letter == "Z":
            return lambda text, start: frozenset([start] if start == len(text) else [])
        if letter.isalnum():
            raise self.refuse(f"\\{letter}")
        return _one(lambda c: c == letter)

    def set_of_characters(self) -> Ends:
        start = self.at - 1
        end = start + 1 + (self.pattern[start + 1] == "^")
        end += 2 if self.pattern[end] == "\\" else 1  # a bracket that comes first is a member
        while self.pattern[end] != "]":
            end += 2 if self.pattern[end] == "\\" else 1
        one = re.compile(self.pattern[start : end + 1])  # a single character: nothing to backtrack into
        self.at = end + 1
        return _one(lambda c: one.fullmatch(c) is not None)


def _one(allowed: Callable[[str], bool]) -> Ends:
    return lambda text, start: frozenset([start + 1] if start < len(text) and allowed(text[start]) else [])
