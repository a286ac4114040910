"""What of a record is a document: a field or a prompt format, and which records at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nemo_upcycle.errors import UpcyclingError


@dataclass(frozen=True)
class Selection:
    """What of a record is a document.

    Attributes:
        text_key: The field with the text.
        where: Fields that must have these values, as text; other records are left out.
        template: A prompt format in Jinja over the record's fields, instead of `text_key`.
    """

    text_key: str = "text"
    where: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    @property
    def columns(self) -> list[str] | None:
        """The fields that are read; None: all of them."""
        return None if self.template else [self.text_key, *self.where]

    def of(self, record: Any) -> tuple[str | None, str | None]:
        """Return a record's text, or why it has none; neither where it is left out."""
        if not isinstance(record, dict):
            return None, f"expected an object, found {type(record).__name__}"
        for key, value in self.where.items():
            if key not in record:
                return None, f'no "{key}"'
            if str(record[key]) != value:
                return None, None
        if self.template is not None:
            text, error = _rendered(self.template, record)
            if error:
                return None, error
        else:
            text = record.get(self.text_key)
        if not isinstance(text, str):
            return None, f'expected a string under "{self.text_key}"'
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # a lone \ud800 escape, which tokenizers refuse
            return None, f"not valid Unicode: {error}"
        return text, None


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
    except Exception as error:  # a template may do anything to a record
        return None, f"the template does not fit: {type(error).__name__}: {error}"
