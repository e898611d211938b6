"""What a GGUF file says of its tokenizer, held against the tokenizer that Transformers made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

FIRST, ADDS_FIRST = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"
TOKENS = "tokenizer.ggml.tokens"


def check_first_token(tokenizer: PreTrainedTokenizerBase, name: str, gguf_file: str, arguments: dict[str, Any]) -> None:
    """Refuse a tokenizer that leaves out the token with which the file says that every text begins.

    Transformers 5.17 makes such ones of Llama-3's files; a model reads what it was never trained on, and answers worse.

    Args:
        tokenizer: made of the file.
        name, gguf_file: folder or repository, and the file in it.
        arguments: with which it was loaded.

    Raises:
        ValueError: it leaves the token out.
    """
    begins = list(tokenizer("a")["input_ids"])
    if len(begins) > 1 and begins[0] == tokenizer.bos_token_id:
        return
    said = _said_of_the_first(Path(name) / gguf_file if Path(name).is_dir() else _cached(name, gguf_file, arguments))
    if said is None or begins[:1] == [said[0]]:
        return
    raise ValueError(
        f"{gguf_file} says that every text begins with {said[1]!r}, and the tokenizer that Transformers "
        f"{transformers.__version__} makes of it puts none there: install Transformers 5.23 or newer, which does, or "
        "use a folder with the model's own weights and tokenizer"
    )


def _said_of_the_first(file: Path) -> tuple[int, str] | None:
    """Return the token that begins each text, by the file: its id and itself. None: there is none, or it says nothing.

    What llama.cpp takes a file to mean that says nothing depends on its kind of tokenizer, so none is asked for.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    adds, first = reader.get_field(ADDS_FIRST), reader.get_field(FIRST)
    if adds is None or first is None or not adds.contents():
        return None
    tokens = reader.get_field(TOKENS)
    token = int(first.contents())
    return token, "" if tokens is None else str(tokens.contents(token))


def _cached(name: str, gguf_file: str, arguments: dict[str, Any]) -> Path:
    """Return the file of a repository, which was read from there a moment ago."""
    hub = {key: value for key, value in arguments.items() if key != "gguf_file"}
    return Path(str(cached_file(name, gguf_file, **hub)))
