"""A blend of datasets, described by one YAML file: sources, selections and weights."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from nemo_upcycle import settings
from nemo_upcycle.data.paths import DataPath, check_dataset_name, text_of
from nemo_upcycle.data.selection import Selection
from nemo_upcycle.data.sources import resolved
from nemo_upcycle.errors import UpcyclingError

SHIPPED = Path(__file__).parent / "blends"


@dataclass
class DatasetSettings:
    """A dataset of a blend; see `Selection`.

    Attributes:
        weight: Share within the group, relative to the group's other datasets.
        sources: Sources in the syntax of `nemo-upcycle data tokenize`; relative paths start at the
            YAML file's directory.
        text_key: Field with the text.
        template: Prompt format as a Jinja template over a record's fields, as in lm-eval.
        where: Fields with the values that a record must have.
    """

    weight: float = 1.0
    sources: list[str] = field(default_factory=list)
    text_key: str = "text"
    template: str | None = None
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class GroupSettings:
    """Datasets that share a weight."""

    weight: float = 1.0
    datasets: dict[str, DatasetSettings] = field(default_factory=dict)


@dataclass
class BlendSettings:
    """The contents of the YAML file.

    Attributes:
        directory: Directory of the prepared datasets, relative to the YAML file.
        groups: Groups by name.
    """

    directory: str = "."
    groups: dict[str, GroupSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class BlendedDataset:
    """A dataset with a weight in the whole blend.

    Attributes:
        name: The dataset's name.
        weight: Share of the blend; the shares of all datasets sum to 1.
        sources: Sources of the documents.
        selection: Which records are documents, and which part of a record is the text.
        prefix: Path of the prepared dataset, without `.bin` and `.idx`.
    """

    name: str
    weight: float
    sources: tuple[str, ...]
    selection: Selection
    prefix: Path


@dataclass(frozen=True)
class Blend:
    """A blend.

    Attributes:
        datasets: Datasets in the order of the YAML file.
    """

    datasets: tuple[BlendedDataset, ...]

    @property
    def data_paths(self) -> str:
        """Weights and prefixes in the syntax of Megatron's `--data-path`."""
        return text_of(
            DataPath(str(each.prefix), float(f"{each.weight:.6g}")) for each in self.datasets
        )


def shipped() -> list[str]:
    """Return the names of the blends that ship with the package."""
    return settings.names_in(SHIPPED)


def read_blend(source: str, directory: Path | None = None) -> Blend:
    """Read a blend.

    Args:
        source: A name from `shipped()`, or a YAML file. A file with `base: llama3_moe` contains
            only the differences from that blend.
        directory: Directory of the prepared datasets; None means the directory in the YAML file.

    Raises:
        UpcyclingError: The blend does not exist, or the YAML file is invalid.
    """
    path = settings.find(source, SHIPPED, "blend")
    said = settings.read(BlendSettings, path, SHIPPED)
    home = path.parent if path.parent != SHIPPED else Path()
    return Blend(tuple(_datasets(said, path, home, directory)))


def _datasets(
    said: BlendSettings, path: Path, home: Path, directory: Path | None
) -> list[BlendedDataset]:
    total = sum(group.weight for group in said.groups.values())
    prepared = home / said.directory if directory is None else directory
    datasets = []
    for group_name, group in said.groups.items():
        of_group = sum(each.weight for each in group.datasets.values())
        for name, each in group.datasets.items():
            _check(path, f"groups.{group_name}.datasets.{name}", group, each)
            check_dataset_name(name, f"{path}: groups.{group_name} has a dataset called")
            datasets.append(
                BlendedDataset(
                    name,
                    group.weight / total * each.weight / of_group,
                    tuple(resolved(source, home) for source in each.sources),
                    Selection(each.text_key, dict(each.where), each.template),
                    prepared / name,
                )
            )
    names = [each.name for each in datasets]
    if not datasets or len(set(names)) < len(names):
        raise UpcyclingError(
            f"{path}: expected groups with datasets whose names differ; found {names}."
        )
    return datasets


def _check(path: Path, place: str, group: GroupSettings, each: DatasetSettings) -> None:
    if not (0 < group.weight < math.inf and 0 < each.weight < math.inf):
        raise UpcyclingError(f"{path}: {place}: weights must be more than 0.")
    if not each.sources:
        raise UpcyclingError(f"{path}: {place}: no sources.")
