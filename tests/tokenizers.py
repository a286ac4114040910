"""Tokenizers of the kinds that people have, made of little text."""

import json
from pathlib import Path
from typing import Any

TEXTS = ["see the end of a text in the vocabulary", "The router sends each token to two experts."]
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_tokenizer(directory: Path, kind: str, added: tuple[str, ...] = ("<tool_call>",)) -> Path:
    """Write a tokenizer of `tokenizers` with special tokens and added ones that are text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, **options)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = [chr(code) for code in range(33, 127)]
        trainer = trainers.UnigramTrainer(
            vocab_size=150, initial_alphabet=alphabet, unk_token="<unk>", **options
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(list(added))
    fast.save_pretrained(str(directory))
    return directory


def write_sentencepiece(directory: Path, kind: str = "unigram", **settings: Any) -> Path:
    """Write `tokenizer.model`, with byte fallback, and a `tokenizer_config.json` of settings."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for path in Path(json.__file__).parent.glob("*.py")
             for line in path.read_text().splitlines()]  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=600,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",  # as Llama's
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def change_config(directory: Path, **settings: Any) -> Path:
    """Change `tokenizer_config.json`; what is None is taken out."""
    path = directory / "tokenizer_config.json"
    said = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return directory
