"""A training starts on data that are what their files claim, or is refused on every rank."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.preparation import Preparation, prepare
from tests.distributed.pool import RankPool, nemo_recipe
from tests.distributed.training import train
from tests.workspace import VOCAB_SIZE, make_workspace

SEQ_LENGTH = 32


def start(
    paths: list[str], tokenizer: Path, rows: int = VOCAB_SIZE, samples: int = 0, **options: Any
) -> Any:
    """Set a data module up as a trainer does; return samples, or the error."""
    from types import SimpleNamespace

    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.nemo.data_module import PreTrainingDataModule
    from nemo_upcycle.nemo.gpt_dataset import GPTDataset
    from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer

    sizes = {"seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 4}
    try:
        module = PreTrainingDataModule(
            paths,
            tokenizer=checkpoint_tokenizer(str(tokenizer)),
            split="970,20,10",
            dataset_cls=GPTDataset,
            **sizes,
            **options,
        )
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=rows))
        batches = {"limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": 4}
        module.trainer = SimpleNamespace(lightning_module=model, max_steps=4, **batches)
        module.setup()
    except UpcyclingError as error:
        return str(error)
    found = [module._train_ds[number] for number in range(samples)]
    return [{name: each[name].tolist() for name in ("tokens", "loss_mask")} for each in found]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def data(workspace: Path, tmp_path: Path) -> Path:
    """The prefix of a copy of the corpus, for one test."""
    return copy_data(workspace, tmp_path / "corpus")


def copy_data(workspace: Path, prefix: Path) -> Path:
    for file in (workspace / "data").glob("sources.*"):
        if file.is_file():
            shutil.copy(file, prefix.with_name(prefix.name + file.name.removeprefix("sources")))
    return prefix


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def manifest(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".manifest.json")


def with_added_token(
    workspace: Path, directory: Path, more: tuple[str, ...] = ("<more>",), **special: str
) -> Path:
    """A tokenizer with one token more than the model has embeddings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(workspace / "tokenizer"))
    tokenizer.add_tokens(list(more))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(str(directory))
    return directory


# --- What is refused -----------------------------------------------------------------------------


def cut_off(prefix: Path, workspace: Path) -> None:
    os.truncate(f"{prefix}.bin", 1000)


def cut_off_without_a_manifest(prefix: Path, workspace: Path) -> None:
    cut_off(prefix, workspace)
    manifest(prefix).unlink()


def a_cut_off_index(prefix: Path, workspace: Path) -> None:
    os.truncate(f"{prefix}.idx", 100)


def no_index(prefix: Path, workspace: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"no index at all" * 10)


def longer(prefix: Path, workspace: Path) -> None:
    with Path(f"{prefix}.bin").open("ab") as file:
        file.write(b"\0\0")


def another_index(prefix: Path, workspace: Path) -> None:
    """As long, and of other documents."""
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[38:46] = content[42:46] + content[38:42]
    Path(f"{prefix}.idx").write_bytes(content)


def no_files(prefix: Path, workspace: Path) -> None:
    Path(f"{prefix}.bin").unlink()


def another_tokenizer(prefix: Path, workspace: Path) -> None:
    """As large: trained on other text."""
    from nemo_upcycle.data.tokenizer import train_tokenizer

    corpora = [workspace / "data" / "documentation.jsonl"]
    train_tokenizer(corpora, prefix.with_name("other"), VOCAB_SIZE)
    again(prefix, workspace, prefix.with_name("other"))


def another_end(prefix: Path, workspace: Path) -> None:
    tokenizer = shutil.copytree(workspace / "tokenizer", prefix.with_name("other"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    again(prefix, workspace, tokenizer)


def an_added_token(prefix: Path, workspace: Path) -> None:
    other = with_added_token(workspace, prefix.with_name("other"))
    again(prefix, workspace, other, ["the token <more> " * 20] * 120)


def an_added_token_without_a_manifest(prefix: Path, workspace: Path) -> None:
    an_added_token(prefix, workspace)
    manifest(prefix).unlink()


def again(prefix: Path, workspace: Path, tokenizer: Path, texts: list[str] | None = None) -> None:
    source = workspace / "data" / "sources.jsonl"
    if texts is not None:
        source = write(prefix.with_name("texts.jsonl"), texts)
    prepare(Preparation((str(source),), tokenizer, prefix))


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "cut off": (cut_off, "has 1,000 bytes, and corpus.idx says"),
    "cut off, no manifest": (cut_off_without_a_manifest, "has 1,000 bytes, and corpus.idx says"),
    "index cut off": (a_cut_off_index, "it is cut off"),
    "no index": (no_index, "is no index of a Megatron dataset"),
    "longer": (longer, "is not what corpus.manifest.json says"),
    "another index": (another_index, "is not what corpus.manifest.json says"),
    "no files": (no_files, "No dataset at"),
    "another tokenizer": (another_tokenizer, "was made with another tokenizer"),
    "another end": (another_end, "end with the token id 0, and the tokenizer's eos token </s>"),
    "an added token": (an_added_token, "has the token id 512, and the model has 512 embeddings"),
    "an added token, no manifest": (
        an_added_token_without_a_manifest,
        "has the token id 512, and the model has 512 embeddings",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_that_are_not_what_they_say(
    ranks: RankPool, workspace: Path, data: Path, fault: str
) -> None:
    make, message = FAULTS[fault]
    make(data, workspace)
    tokenizer = data.with_name("other") if fault.startswith("an added") else workspace / "tokenizer"
    answers = ranks.run(start, 2, paths=[str(data)], tokenizer=tokenizer)
    for answer in answers:
        assert isinstance(answer, str), f"{fault}: started"
        assert message in answer
        assert "\n" not in answer
    assert not (data / "cache").exists()


@pytest.mark.parametrize("rows", [512, 513])
def test_an_end_of_documents_beyond_the_embeddings_is_refused(
    ranks: RankPool, workspace: Path, tmp_path: Path, rows: int
) -> None:
    """Also where TP pads the embeddings, so that there is one more of them."""
    added = {"eos_token": "<end>"} if rows == 513 else {"eos_token": "<more>"}
    tokenizer = with_added_token(workspace, tmp_path / "tokenizer", **added)
    again(tmp_path / "data", workspace, tokenizer)
    for answer in ranks.run(
        start, 2, paths=[str(tmp_path / "data")], tokenizer=tokenizer, rows=rows
    ):
        assert f"has the id {rows}, and the model has {rows} embeddings" in answer
    with pytest.raises(Exception, match=f"has the token id {rows}, and the model has {rows}"):
        from nemo_upcycle.data.checks import check_on_login
        from nemo_upcycle.data.paths import parse

        check_on_login(parse(str(tmp_path / "data")), rows)


def test_a_beginning_of_texts_beyond_the_embeddings_is_refused(
    ranks: RankPool, workspace: Path, data: Path, tmp_path: Path
) -> None:
    tokenizer = with_added_token(workspace, tmp_path / "tokenizer", bos_token="<more>")
    for answer in ranks.run(start, 2, paths=[str(data)], tokenizer=tokenizer):
        assert "the tokenizer's bos token <more> has the id 512, and the model has 512" in answer


def start_mock(tokenizer: Path) -> Any:
    from types import SimpleNamespace

    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.nemo.data_module import MockDataModule
    from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer

    sizes = {"seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 4}
    module = MockDataModule(tokenizer=checkpoint_tokenizer(str(tokenizer)), **sizes)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB_SIZE))
    module.trainer = SimpleNamespace(lightning_module=model)
    try:
        module.setup()
    except UpcyclingError as error:
        return str(error)
    item = module._train_ds[0]
    return len(item["tokens"]), list(item["attention_mask"].shape)


def test_mock_data_of_a_larger_tokenizer_are_refused(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    tokenizer = with_added_token(workspace, tmp_path / "tokenizer")
    said = "mock data are random ids of the tokenizer's 513 tokens, and the model has 512"
    for answer in ranks.run(start_mock, 2, tokenizer=tokenizer):
        assert said in answer
    (fits,) = ranks.run(start_mock, 1, tokenizer=workspace / "tokenizer")
    assert fits == (SEQ_LENGTH, [1, SEQ_LENGTH, SEQ_LENGTH])  # without a mask the model refuses


# --- What is not ---------------------------------------------------------------------------------


def test_the_same_tokenizer_is_known_wherever_it_is(
    ranks: RankPool, workspace: Path, data: Path, tmp_path: Path
) -> None:
    """In the dense checkpoint, with a chat template, and with a token that no document has."""
    chat = shutil.copytree(workspace / "tokenizer", tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    (chat / "notes.txt").write_text("of no matter")
    added = with_added_token(workspace, tmp_path / "added", more=(), pad_token="<pad>")
    for tokenizer in (workspace / "dense_hf", chat, added):
        (answer,) = ranks.run(start, 1, paths=[str(data)], tokenizer=tokenizer, samples=1)
        assert isinstance(answer, list), answer


def test_files_of_megatrons_own_script_and_old_manifests_are_taken(
    ranks: RankPool, workspace: Path, data: Path
) -> None:
    """Neither says what it was made with; a doubt is no error."""
    said = json.loads(manifest(data).read_text())
    old = {k: v for k, v in said.items() if k not in ("tokenizer", "spelled", "largest_id")}
    manifest(data).write_text(json.dumps(old))
    (answer,) = ranks.run(start, 1, paths=[str(data)], tokenizer=workspace / "tokenizer")
    assert answer == []
    manifest(data).unlink()
    (answer,) = ranks.run(start, 1, paths=[str(data)], tokenizer=workspace / "tokenizer")
    assert answer == []


def doubts(prefix: str, tokenizer: Path) -> list[str]:
    import warnings

    from nemo_upcycle.checkpoint.tokenizer_files import load_tokenizer
    from nemo_upcycle.data.checks import Dataset, TokenizerCheck
    from nemo_upcycle.data.paths import DataPath

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        TokenizerCheck(load_tokenizer(tokenizer)).check(Dataset(DataPath(prefix)))
    return [str(each.message) for each in said if "another tokenizer" in str(each.message)]


def test_data_that_do_not_say_are_doubted_by_what_they_spell(
    ranks: RankPool, workspace: Path, data: Path
) -> None:
    manifest(data).unlink()
    right = {"prefix": str(data), "tokenizer": workspace / "tokenizer"}
    assert ranks.run(doubts, 1, **right) == [[]]
    another_tokenizer(data, workspace)
    manifest(data).unlink()
    ((doubt,),) = ranks.run(doubts, 1, **right)
    assert "seems to be made with another tokenizer" in doubt


def test_a_padding_token_that_is_the_end_token_takes_nothing_out_of_the_text(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """Megatron would make token 0 of each document's end, and leave that out of the loss."""
    tokenizer = shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    again(tmp_path / "data", workspace, tokenizer, ["a short one"] * 120)
    (answer,) = ranks.run(start, 1, paths=[str(tmp_path / "data")], tokenizer=tokenizer, samples=3)
    for sample in answer:
        assert 1 in sample["tokens"] and 0 not in sample["tokens"]
        assert set(sample["loss_mask"]) == {1.0}


# --- Indices -------------------------------------------------------------------------------------


def indices(prefix: Path) -> set[str]:
    return {file.name for file in (prefix / "cache" / "GPTDataset_indices").iterdir()}


@pytest.mark.thorough
def test_other_data_under_the_same_prefix_are_trained_on(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """The losses are those without Megatron's old index, which is not kept."""
    texts = [json.loads(line)["text"] for line in
             (workspace / "data" / "sources.jsonl").read_text().splitlines()]  # fmt: skip
    prefix = tmp_path / "corpus"
    source = tmp_path / "texts.jsonl"

    def losses(name: str) -> Any:
        options = {"name": name, "max_steps": 2, "data_paths": str(prefix)}
        overrides = {"log.ckpt": None, "trainer.limit_val_batches": 0}
        ((found, _),) = ranks.run(
            train, 1, directory=workspace, options=options, overrides=overrides
        )
        return found

    def make(texts: list[str]) -> None:
        write(source, texts)
        prepare(Preparation((str(source),), workspace / "tokenizer", prefix))

    make(texts[:100])
    before = losses("before")
    old = indices(prefix)
    make(texts)
    after = losses("after")
    assert not old & indices(prefix)
    assert len(old) == len(indices(prefix))
    shutil.rmtree(prefix / "cache")
    assert after == losses("without") != before


def test_a_blend_in_one_place_for_indices_follows_its_data(
    ranks: RankPool, workspace: Path, data: Path, tmp_path: Path
) -> None:
    place = tmp_path / "indices"
    blend = ["0.7", str(data), "0.3", str(copy_data(workspace, tmp_path / "rest"))]
    given = {"tokenizer": workspace / "tokenizer", "samples": 8}
    there = {"index_mapping_dir": str(place)}
    first = ranks.run(start, 2, paths=blend, **given, **there)
    assert first[0] == first[1]
    old = {file.name for file in place.iterdir()}
    assert ranks.run(start, 2, paths=blend, **given, **there) == first
    assert {file.name for file in place.iterdir()} == old
    again(data, workspace, workspace / "tokenizer", [f"number {n} " * 30 for n in range(150)])
    second = ranks.run(start, 2, paths=blend, **given, **there)
    assert second[0] == second[1] != first[0]
    assert second == ranks.run(start, 2, paths=blend, **given)
    new = {file.name for file in place.iterdir()}
    assert len(new) == len(old)
    assert len(new & old) == 12  # three splits of the dataset that is the same


def test_a_directory_that_cannot_be_written_to(
    ranks: RankPool, workspace: Path, data: Path, tmp_path: Path
) -> None:
    """Indices go to the run's directory; without one the way out is named."""
    data.write_text("in the way")  # where Megatron makes its directory
    given = {"paths": [str(data)], "tokenizer": workspace / "tokenizer"}
    for answer in ranks.run(start, 2, **given):
        assert "data.index_mapping_dir=DIR" in answer
    assert ranks.run(start, 2, **given, index_mapping_dir=str(tmp_path / "elsewhere")) == [[], []]
    assert ranks.run(start_with_a_run, 1, run=tmp_path / "run", **given) == [[]]
    assert len(list((tmp_path / "run" / "index").iterdir())) == 12


def start_with_a_run(run: Path, **given: Any) -> Any:
    from nemo.utils import AppState

    AppState().log_dir = run
    return start(**given)


@nemo_recipe
def train_and_hear(**given: Any) -> tuple[Any, str]:
    """Train; return what comes of it, and what this rank says."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    heard = io.StringIO()
    with redirect_stdout(heard), redirect_stderr(heard):
        found = train(**given)
    return found, heard.getvalue()


def test_another_tokenizer_than_the_dense_models_is_said(
    ranks: RankPool, workspace: Path, tmp_path: Path
) -> None:
    """As many tokens, and data made with it: nothing else shows it."""
    other = Path(shutil.copytree(workspace / "tokenizer", tmp_path / "swapped"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    corpus = workspace / "data" / "sources.jsonl"
    prepare(Preparation((str(corpus),), other, tmp_path / "corpus"))
    options = {"max_steps": 1, "tokenizer": str(other), "data_paths": str(tmp_path / "corpus")}
    ((found, said),) = ranks.run(
        train_and_hear, 1, directory=workspace, options=options | {"name": "swapped"}
    )
    assert not isinstance(found, str), found
    told = "gives texts other tokens than"
    assert f"[data] {other} {told} {workspace / 'dense_hf'}, the tokenizer beside" in said
    assert f"not exact: the tokenizer {told} {workspace / 'dense_hf'}, which is beside" in said
