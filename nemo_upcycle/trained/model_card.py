"""The model card of an upcycled model, and the dense model's licence, which travels with it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")

_TRAVELS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a card's metadata that hold for the upcycled model too."""

_TAGS = ["moe", "upcycled", "nemo-upcycle"]

_FENCE = "---"


def hub_name(directory: Path) -> str:
    """Return a model's name on the hub if the directory is in the hub's cache; else its own name.

    The path is left out: a card is published, a path of one's own machine is not.
    """
    for parent in directory.parents:
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/")
    return directory.resolve().name


UPCYCLED = "upcycled from {names} with nemo-upcycle (online upcycling, arXiv 2412.09952)"


def write_model_card(
    directory: Path,
    title: str,
    sources: Mapping[str, Path],
    facts: Mapping[str, str],
    made: str = UPCYCLED,
) -> None:
    """Write the card, and copy the licences.

    Args:
        directory: The new model's.
        title: The new model's name.
        sources: Directories of the models that it was made of, by name.
        facts: What to say of the model, by heading.
        made: How the model was made, with `{names}`.
    """
    metadata: dict[str, Any] = {"library_name": "transformers", "base_model": list(sources)}
    cards = []
    for name, source in sources.items():
        said, text = _card(source)
        metadata |= {key: said[key] for key in _TRAVELS if key in said}
        if text.strip():
            cards.append(f"## Card of {name}\n\n{_deeper(text)}\n")
        for pattern in _LICENCES:
            for path in filter(Path.is_file, source.glob(pattern)):
                shutil.copy(path, directory / path.name)
    metadata["tags"] = _TAGS
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    text = (
        f"{_FENCE}\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}{_FENCE}\n\n"
        f"# {title}\n\n"
        f"A Mixture-of-Experts model, {made.format(names=' and '.join(sources))}. "
        f"**Not trained since.**\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )
    (directory / CARD).write_text(text + "\n".join(cards))


def _card(source: Path) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a dense model's card; both empty if there is none."""
    try:
        text = (source / CARD).read_text()
    except (OSError, UnicodeDecodeError):
        return {}, ""
    if not text.startswith(_FENCE):
        return {}, text
    _, head, rest = [*text.split(_FENCE, 2), "", ""][:3]
    try:
        said = yaml.safe_load(head)
    except yaml.YAMLError:
        said = None
    return (said, rest) if isinstance(said, dict) else ({}, rest)


def _deeper(text: str) -> str:
    """Return a card's text with its headings two levels deeper, outside of code."""
    lines, in_code = [], False
    for line in text.strip().splitlines():
        in_code ^= line.startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not in_code else line)
    return "\n".join(lines)
