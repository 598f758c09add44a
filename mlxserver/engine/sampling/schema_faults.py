"""Faults of a schema that llguidance refuses: where they are, and the refusal that names the place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from mlxserver.engine.errors import PromptRejected, one_line
from mlxserver.engine.sampling.schema_document import SchemaDocument, Subschema, Unenforceable
from mlxserver.engine.sampling.schema_keywords import REFERENCES
from mlxserver.engine.sampling.schema_normalizer import Normalizer

# White space that models write in JSON: a space, or a line break with an indentation. llguidance allows one such piece
# between two tokens of JSON, so that no model can go on with white space for ever.
WHITE_SPACE = {"whitespace_pattern": r" |\n[ \t]{0,16}"}

SEARCH_SECONDS = 1.0  # of computing, after which the schema found by then is the place
UNSATISFIABLE = "Unsatisfiable"  # the beginning of llguidance's reason where no value fits
LONGEST_REASON = 200

Reason = Callable[[str], str | None]  # why the text of a schema can't be compiled


def schema_text(form: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Text of a normal form with its definitions."""
    # The options come last: llguidance puts the last keyword in their place, and the order of keywords is that of keys.
    return json.dumps({"$defs": definitions, **form, "x-guidance": WHITE_SPACE})


@contextmanager
def refusing(document: SchemaDocument) -> Generator[None]:
    """Make what can't be enforced of a document a refusal. Raises PromptRejected."""
    try:
        yield
    except Unenforceable as fault:
        raise rejected(document, fault) from None
    except RecursionError:
        raise PromptRejected(f"{document.name} can't be used: nested too deeply.", document.param) from None


def rejected(document: SchemaDocument, fault: Unenforceable) -> PromptRejected:
    """The refusal of a schema for a fault in it."""
    place = f"at {fault.path[1:]}: " if fault.path else ""
    return PromptRejected(f"{document.name} can't be used: {place}{fault.reason}.", document.param + fault.path)


def find_fault(document: SchemaDocument, reason: Reason) -> Unenforceable | None:
    """The innermost schema of a document that can't be compiled by itself, and its keyword; None if there is none."""
    return _Search(document, reason).find()


class _Search:
    def __init__(self, document: SchemaDocument, reason: Reason) -> None:
        self._document = document
        self._compile = reason
        self._deadline = time.thread_time() + SEARCH_SECONDS
        self._seen: set[int] = set()

    def find(self) -> Unenforceable | None:
        at = self._document.root
        reason = self._reason(at)
        if reason is None:
            return None
        while inner := self._inner(at, reason):
            at, reason = inner
        keyword = self._keyword(at, reason)
        return Unenforceable(at.path + (f".{keyword}" if keyword else ""), _plain(reason))

    def _reason(self, at: Subschema) -> str | None:
        """Why a schema can't be compiled by itself."""
        normalizer = Normalizer()
        try:
            form = normalizer.add(self._document, at)
        except Unenforceable as fault:
            return f"{UNSATISFIABLE}: {fault.reason}"
        return self._compile(schema_text(form, normalizer.definitions))

    def _inner(self, at: Subschema, reason: str) -> tuple[Subschema, str] | None:
        """A schema within this one that has the same fault. One that nothing fits is none where it is left out."""
        for child in [*at.children(), *self._targets(at)]:
            if id(child.value) in self._seen or isinstance(child.value, bool) or time.thread_time() > self._deadline:
                continue
            self._seen.add(id(child.value))
            found = self._reason(child)
            if found and found.startswith(UNSATISFIABLE) == reason.startswith(UNSATISFIABLE):
                return child, found
        return None

    def _targets(self, at: Subschema) -> list[Subschema]:
        return [self._document.resolve(at, word) for word in REFERENCES if word in at.keywords]

    def _keyword(self, at: Subschema, reason: str) -> str | None:
        """The keyword that can't be compiled by itself."""
        for keyword, value in at.keywords.items():
            alone = {keyword: value} | {name: at.keywords[name] for name in ("type",) if name in at.keywords}
            if time.thread_time() < self._deadline and self._reason(Subschema(alone, at.base, at.path)):
                return keyword
        return None


def _plain(reason: str) -> str:
    """llguidance's reason in one line: of a diagram in several lines, the last."""
    if "coerce_one_of" in reason:
        return "the options of oneOf may fit the same value; make them differ by a required constant, or use anyOf"
    last = reason.rpartition("error: ")[2]
    return one_line(ValueError(last))[:LONGEST_REASON].rstrip(". ")
