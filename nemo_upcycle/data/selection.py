"""Selection of documents: which records, and which field or prompt format gives the text."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nemo_upcycle.errors import UpcyclingError, listing


@dataclass(frozen=True)
class Selection:
    """Which records are documents, and which part of a record is the text.

    Attributes:
        text_key: Field with the text; `a.b` is the field b of an object under a.
        where: Required field values, compared as text; other records are left out.
        template: Prompt format as a Jinja template over the record's fields, instead of `text_key`.
    """

    text_key: str = "text"
    where: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    def columns_of(self, names: Collection[str]) -> list[str] | None:
        """Return the columns to read from a table; None means all columns."""
        if self.template:
            return None
        keys = [self.text_key, *self.where]
        return list(dict.fromkeys(k if k in names else k.partition(".")[0] for k in keys))

    def of(self, record: Any) -> tuple[str | None, str | None]:
        """Return (text, error) of a record; both are None for an excluded record."""
        if not isinstance(record, dict):
            hint = ": jq -c '.[]' FILE writes one per line" if isinstance(record, list) else ""
            return None, f"expected an object, found {type(record).__name__}{hint}"
        for key, value in self.where.items():
            actual = _field(record, key)
            if actual is _MISSING:
                return None, f'no "{key}"; there is {_keys(record)}'
            if str(actual) != value:
                return None, None
        if self.template is not None:
            text, error = _rendered(self.template, record)
            if error:
                return None, error
        else:
            text = _field(record, self.text_key)
        if text is _MISSING:
            return None, (
                f'expected a string under "{self.text_key}", there is {_keys(record)}: say which '
                "with --text-key"
            )
        if not isinstance(text, str):
            return None, (
                f'expected a string under "{self.text_key}", found {type(text).__name__}'
                f"{_hint(text)}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # a lone \ud800 escape, which tokenizers refuse
            return None, f"not valid Unicode: {error}"
        return text, None


_MISSING = object()


def _field(record: dict[str, Any], key: str) -> Any:
    """Return a field, possibly of a nested object; `_MISSING` if there is none."""
    if key in record:
        return record[key]
    outer, dot, inner = key.partition(".")
    if dot and isinstance(record.get(outer), dict):
        return _field(record[outer], inner)
    return _MISSING


def _keys(record: dict[str, Any]) -> str:
    names = [f'"{name}"' for name in record]
    return listing(names) if names else "nothing"


def _hint(value: Any) -> str:
    """Return a remedy for a field that is not a string."""
    if isinstance(value, dict):
        return f" with {_keys(value)}: a nested one is OUTER.INNER to --text-key"
    if isinstance(value, bytes):
        return ": a column without the type of a string; cast it"
    return ": say another with --text-key"


@cache
def _compiled(template: str) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)
    except TemplateError as error:
        raise UpcyclingError(f"template {template!r}: {error}") from None


def _rendered(template: str, record: dict[str, Any]) -> tuple[str | None, str | None]:
    compiled = _compiled(template)
    try:
        return compiled.render(record), None
    except Exception as error:  # a template may raise anything
        return None, f"the template does not fit: {type(error).__name__}: {error}"
