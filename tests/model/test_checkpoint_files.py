"""Weight files that are refused before they are loaded, targets that cannot be written, and names of adapters."""

import pickle
import shutil
import zipfile

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graphmoe_model.checkpoints import weights
from graphmoe_model.conversion import read_adapter, write_adapter
from tests.model.adapter_folders import CONFIG, PICKLE, WEIGHTS, contents, loaded
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model

ROUTER = "base_model.model.model.layers.0.mlp.lora_graphmoe.router.weight"

LOADERS = {
    "PeftModel": loaded,
    "further adapter": lambda folder: tiny_peft_model().load_adapter(folder, "second"),
    "Transformers": lambda folder: tiny_model().load_adapter(str(folder)),
    "convert": read_adapter,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_peft_model(rounds=1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A saved adapter's folder."""
    return shutil.copytree(saved, tmp_path / "adapter")


def as_pickle(folder, state) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / PICKLE)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype, short", [(torch.int64, "I64"), (torch.complex64, "C64")])
def test_tensors_that_are_no_floating_point_are_refused(loader, dtype, short, folder):
    """PEFT would truncate them, or drop their imaginary parts. Named with their dtype, from both kinds of file."""
    state = load_file(folder / WEIGHTS)
    state[ROUTER] = state[ROUTER].to(dtype)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"floating point.*router.weight' \((torch\.\w+|{short})\)"):
        LOADERS[loader](folder)
    as_pickle(folder, state)
    with pytest.raises(ValueError, match=rf"floating point.*router.weight' \({dtype}\)"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_sparse_tensors_and_tensors_without_data_are_refused(loader, folder):
    state = load_file(folder / WEIGHTS)
    for tensor, kind in [(state[ROUTER].to_sparse(), "torch.sparse_coo"), (state[ROUTER].to("meta"), "meta")]:
        (folder / WEIGHTS).touch()
        as_pickle(folder, {**state, ROUTER: tensor})
        with pytest.raises(ValueError, match=rf"router.weight' \(torch.float32, {kind}\)"):
            LOADERS[loader](folder)


def test_copies_of_base_modules_have_data_too(tmp_path):
    """They may have any dtype, but a tensor without data ended in an error of load_state_dict."""
    tiny_peft_model(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.lm_head.weight"
    for tensor, kind in [(state[name].to_sparse(), "torch.sparse_coo"), (state[name].to("meta"), "meta")]:
        (tmp_path / WEIGHTS).touch()
        as_pickle(tmp_path, {**state, name: tensor})
        with pytest.raises(ValueError, match=rf"dense tensors with data.*lm_head.weight' \(torch.float32, {kind}\)"):
            PeftModel.from_pretrained(tiny_model(), tmp_path)


def packed(path, **parts: int) -> None:
    """An archive like torch.save's with parts of these sizes, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in parts.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", b"}" * size)


@pytest.mark.parametrize("loader", ["PeftModel", "convert"])
@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b""), "adapter_model.bin is empty"),
        (lambda path: path.write_bytes(b"x"), "reading it could run code, or it is damaged"),
        (lambda path: path.write_bytes(pickle.dumps([{}] * 10)), "could run code|must hold a dictionary"),
        (lambda path: path.write_bytes(b"}" * (weights.PICKLE_LIMIT + 1)), "no archive as torch.save writes"),
        (lambda path: packed(path, data_pkl=100_000), "unpacks to 100,000: torch.save packs nothing"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is damaged"),
    ],
    ids=["empty", "one byte", "pickle", "large pickle", "packed", "broken archive"],
)
def test_pickles_that_are_out_of_proportion_or_damaged_are_refused(loader, write, message, folder, monkeypatch):
    """A pickle may take 200 times its size in memory: what is too large is not read."""
    (folder / WEIGHTS).unlink()
    write(folder / PICKLE)
    if "limit" in message or "no archive" in message or "packs" in message:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](folder)


def test_an_archive_with_too_long_a_list_of_tensors_is_not_read(folder, monkeypatch):
    with zipfile.ZipFile(folder / PICKLE, "w") as archive:
        archive.writestr("archive/data.pkl", b"}" * (weights.PICKLE_LIMIT + 1))
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"its list of tensors has 4,194,305 bytes, and only 4,194,304 are read"):
        loaded(folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("size", [0, 5, 1000])
def test_cut_safetensors_are_refused(loader, size, folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is damaged|is empty"):
        LOADERS[loader](folder)


def test_a_configuration_nested_without_end_is_no_json(folder):
    (folder / CONFIG).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is not JSON"):
        read_adapter(folder)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_moves(folder):
    """PEFT's own files were replaced one by one, so the configuration was new and the weights were not."""
    adapter = read_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    before = contents(folder)
    for write in (tiny_peft_model().save_pretrained, lambda place: write_adapter(adapter, place, overwrite=True)):
        with pytest.raises(FileExistsError, match=r"adapter_model.safetensors is a folder where a file of that name"):
            write(folder)
        assert contents(folder) == before


def test_a_broken_link_is_named(folder, tmp_path):
    adapter = read_adapter(folder)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for write in (tiny_peft_model().save_pretrained, lambda place: write_adapter(adapter, place)):
        with pytest.raises(FileExistsError, match=r"link is a symbolic link to .*nowhere, which is not there"):
            write(tmp_path / "link")


def test_a_killed_save_does_not_make_a_new_folder_one_in_use(folder, tmp_path):
    (tmp_path / "new" / ".saving-dead").mkdir(parents=True)
    (tmp_path / "new" / ".saving-dead" / WEIGHTS).write_text("half")
    write_adapter(read_adapter(folder), tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {CONFIG, WEIGHTS}


def test_weights_of_the_other_type_go(folder):
    """PEFT reads the safetensors first: they would hide the new pickle."""
    model = tiny_peft_model(init_lora_weights=False, rounds=1)
    model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    assert torch.equal(loaded(folder), logits(model))


def test_a_full_disk_is_an_error_of_the_operating_system(folder, tmp_path, monkeypatch):
    """safetensors has an error of its own for it, which the command line did not expect."""

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    adapter = read_adapter(folder)
    monkeypatch.setattr("graphmoe_model.conversion.adapter.save_file", full)
    with pytest.raises(OSError, match="cannot be written: I/O error: No space left on device"):
        write_adapter(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- names of adapters -----------------------------------------------------------------------------------------------

REFUSED = {
    "a.b": "has '.' in it",
    "..": "has '.' in it",
    "a/b": "has '/' in it",
    "a\\b": r"has '\\\\' in it",
    "$": r"has '\$' in it",
    "a(b)": r"has '\(' and '\)' in it",
    "": "a text that is not empty",
    "train": "an attribute of PyTorch's containers",
    "keys": "an attribute of PyTorch's containers",
    "items": "an attribute of PyTorch's containers",
    "act_fn": "also the name of a module",
    "lora_graphmoe": "also the name of a module",
    "base_layer": "also the name of a module",
    "modules_to_save": "also the name of a module",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_is_refused_wherever_an_adapter_gets_it(name, folder):
    """The first adapter's, a further one's, a loaded one's: what can be added can be loaded."""
    model, bare = tiny_peft_model(rounds=1), tiny_model()
    ways = [
        lambda: get_peft_model(bare, tiny_config(), adapter_name=name),
        lambda: model.add_adapter(name, tiny_config()),
        lambda: model.load_adapter(folder, name),
        lambda: PeftModel.from_pretrained(bare, folder, adapter_name=name),
    ]
    if name:  # Transformers takes an empty name for the default one
        ways.append(lambda: tiny_model().add_adapter(tiny_config(), name))
    for way in ways:
        with pytest.raises(ValueError, match=REFUSED[name]):
            way()
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["2nd", "my adapter a+b", "lora"])
def test_a_name_that_is_taken_is_saved_and_loaded_everywhere(name, tmp_path):
    model = get_peft_model(tiny_model(), tiny_config(init_lora_weights=False, rounds=1), adapter_name=name)
    model.add_adapter("other", tiny_config(rounds=1))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    bare = tiny_model()
    bare.load_adapter(str(tmp_path / name), name)
    for again in (bare, PeftModel.from_pretrained(tiny_model(), tmp_path / name, adapter_name=name)):
        assert torch.equal(logits(again), expected)
