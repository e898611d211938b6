"""Folders of saved adapters, with up to two things in them changed: the configuration, the tensors, the files."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphmoe_kernels.validation import shown
from tests.model.method_models import adapted, randomise
from tests.model.peer_format import KINDS, peer_settings, peer_tensors
from tests.model.tiny_models import tiny_peft_model

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Saved(NamedTuple):
    """What a folder holds: settings, tensors, and the raw bytes of files that take their place or stand beside them."""

    settings: dict[str, Any]
    tensors: dict[str, Any]
    files: dict[str, bytes | None]
    history: tuple[str, ...]  # what it was, and what was done to it

    def __repr__(self) -> str:
        return " | ".join(self.history)

    def write(self, folder: Path) -> None:
        """The folder; a file whose bytes are None is left out."""
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(self.settings))
        if all(isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta for t in self.tensors.values()):
            save_file({name: t.contiguous() for name, t in self.tensors.items()}, folder / WEIGHTS)
        else:
            torch.save(self.tensors, folder / BIN)
        for name, data in self.files.items():
            (folder / name).unlink(missing_ok=True)
            if data is not None:
                (folder / name).write_bytes(data)


# --- as they are saved -----------------------------------------------------------------------------------------------


@functools.cache
def ours(form: str) -> Saved:
    """An adapter of this package, every tensor away from its start."""
    model = tiny_peft_model(modules_to_save=["lm_head"]) if form == "lm_head" else adapted(form)
    randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = json.loads((Path(folder) / CONFIG).read_text())
        return Saved(settings, load_file(Path(folder) / WEIGHTS), {}, (form,))


@functools.cache
def theirs(kind: str) -> Saved:
    """An adapter as MoE-PEFT or PEFT saves it."""
    settings = peer_settings(kind)
    return Saved(settings, peer_tensors(settings), {}, (kind,))


FORMS = ("graphmoe-mixlora", "graphmoe-mixdora", "loramoe", "moda", "lora", "lm_head")

# --- and changed -----------------------------------------------------------------------------------------------------

JSON_VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 0.5, 1e300, 10**18, 10**400, "", "x", "(", ".*", "1", "2-4", "4-4"),
    *([], [5], [0], [0, 1], ["mlp"], ["x"], ["("], [None], [[]], [4, 4], [3, 4], {}, {"mlp": 2}, {"[/q]": 2}),
    *({"(": 2}, {"mlp": None}, {"a": {"b": {}}}, "mixlora", "mola", "lora", "MIXLORA", "CAUSAL_LM", "é", "\0"),
]
KEYS = ["a new key", "modules_to_save", "rank_pattern", "num_experts", "layers_to_transform", "target_modules"]
TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): (lambda t, d=d: t.to(d)) for d in (torch.float16, torch.bfloat16, torch.float64)},
    **{str(d): (lambda t, d=d: t.to(d)) for d in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)},
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
    "a row less": lambda t: t[:-1],
    "no rows": lambda t: t[:0],
    "a dimension more": lambda t: t[None],
    "a number": lambda t: t.sum(),
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "zeros": torch.zeros_like,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "no tensor": lambda t: t.tolist(),
}
RENAMES = [
    *((".1.", ".٣."), (".1.", ".01."), (".1.", f".1{'0' * 30}."), (".0.", ".0.0."), ("mlp", "ffn"), ("mlp", "mlp.x")),
    *(("lora", "Lora"), ("base_model.model.", ""), ("A", "B"), ("weight", "weights"), ("", ""), ("q_proj", "lm_head")),
]
FILES: list[Callable[[bytes], bytes | None]] = [
    lambda data: None,
    lambda data: b"",
    lambda data: b"\x80",
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: data[1:],
    lambda data: data + b"\0",
    lambda data: b"[" * 100_000,
    lambda data: b"null",
    lambda data: b"[]",
    lambda data: b"\xff\xfe",
]


@st.composite
def changed(draw: Any, saved: Saved) -> Saved:
    """One change."""
    kind = draw(st.sampled_from(["setting", "setting", "tensor", "tensor", "name", "file"]))
    settings, tensors, files = dict(saved.settings), dict(saved.tensors), dict(saved.files)
    done = "nothing"
    if kind == "setting":
        key = draw(st.sampled_from([*sorted(settings), *KEYS]))
        if draw(st.integers(0, 5)):
            settings[key] = draw(st.sampled_from(JSON_VALUES))
            done = f"{key}={shown(settings[key])}"
        else:
            settings.pop(key, None)
            done = f"no {key}"
    elif kind == "tensor" and tensors:
        name = draw(st.sampled_from(sorted(tensors)))
        if not isinstance(tensors[name], Tensor) or not draw(st.integers(0, 5)):
            del tensors[name]
            done = f"no {name}"
        else:
            change = draw(st.sampled_from(sorted(TENSOR_CHANGES)))
            done = f"{name}: {change}"
            # A tensor may have no such form: two changes can exclude each other.
            with contextlib.suppress(RuntimeError, NotImplementedError, IndexError, TypeError):
                tensors[name] = TENSOR_CHANGES[change](tensors[name])
    elif kind == "name" and tensors:
        old, new = draw(st.sampled_from(RENAMES))
        names = sorted(tensors) if draw(st.booleans()) else [draw(st.sampled_from(sorted(tensors)))]
        for name in names:
            tensors[name.replace(old, new)] = tensors.pop(name)
        done = f"{old!r} is {new!r} in {names[0] if len(names) == 1 else 'all names'}"
    elif kind == "file":
        name = draw(st.sampled_from([CONFIG, WEIGHTS, BIN]))
        with tempfile.TemporaryDirectory() as folder:
            saved.write(Path(folder) / "saved")
            path = Path(folder) / "saved" / name
            files[name] = draw(st.sampled_from(FILES))(path.read_bytes() if path.is_file() else b"\x80\x02}.")
        data = files[name]
        done = f"{name}: " + ("missing" if data is None else f"{len(data)} bytes, {data[:8]!r} to {data[-8:]!r}")
    return Saved(settings, tensors, files, (*saved.history, done))


def folders(sources: list[Saved]) -> st.SearchStrategy[Saved]:
    """A saved adapter with one or two changes, now and then with none."""
    whole = st.sampled_from(sources)
    once = whole.flatmap(changed)
    return st.one_of(once, once, once.flatmap(changed), whole)


def our_folders() -> st.SearchStrategy[Saved]:
    return folders([ours(form) for form in FORMS])


def their_folders() -> st.SearchStrategy[Saved]:
    return folders([theirs(kind) for kind in KINDS])
