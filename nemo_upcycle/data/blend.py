"""A blend of datasets as one YAML: where they come from, what of them, and their weights."""

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
        weight: Its share within its group, relative to the others'.
        sources: As `nemo-upcycle data tokenize` takes them; paths are relative to the YAML.
        text_key: The field with the text.
        template: A prompt format in Jinja, as lm-eval has them, over a record's fields.
        where: Fields that must have these values.
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
    """What the YAML says.

    Attributes:
        directory: Where the prepared datasets are; relative to the YAML.
        groups: By name.
    """

    directory: str = "."
    groups: dict[str, GroupSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class BlendedDataset:
    """A dataset with its weight in the whole blend.

    Attributes:
        name: Its name.
        weight: Its share; all shares sum to 1.
        sources: Where it comes from.
        selection: What of a record is a document.
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
        datasets: In the YAML's order.
    """

    datasets: tuple[BlendedDataset, ...]

    @property
    def data_paths(self) -> str:
        """What Megatron's `--data-path` takes: weights and prefixes."""
        return text_of(
            DataPath(str(each.prefix), float(f"{each.weight:.6g}")) for each in self.datasets
        )


def shipped() -> list[str]:
    """Return the names of the blends that the package has."""
    return settings.names_in(SHIPPED)


def read_blend(source: str, directory: Path | None = None) -> Blend:
    """Read a blend.

    Args:
        source: One of `shipped()`, or a YAML file; with `base: llama3_moe` it says only what
            differs.
        directory: Where the prepared datasets are; None takes what the YAML says.

    Raises:
        UpcyclingError: There is none, or it says something wrong.
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
