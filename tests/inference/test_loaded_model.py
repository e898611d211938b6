"""What a model of `load_for_inference` does not do, and folders and devices that it cannot be loaded from or to."""

from __future__ import annotations

import pytest

from graphmoe_inference import load_for_inference
from graphmoe_model.exporting import export_for_inference
from tests.inference.test_export import routed


def test_a_loaded_model_is_not_saved_as_one_that_transformers_would_fill_with_random_weights(tmp_path):
    """Its layers' names are not the base's: what `save_pretrained` wrote, `from_pretrained` would not find."""
    export_for_inference(routed(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is saved already: copy the folder .*out"):
        load_for_inference(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_dtype_is_one_of_pytorch(tmp_path):
    with pytest.raises(TypeError, match=r"a torch\.dtype such as torch\.bfloat16, or None, got 'bf16'"):
        load_for_inference(tmp_path, dtype="bf16")


def test_a_part_of_an_export_and_a_missing_device_are_named(tmp_path):
    export_for_inference(routed(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is the base model inside of an export; name .*out$"):
        load_for_inference(tmp_path / "out" / "base")
    with pytest.raises(ValueError, match="cannot be moved to device='cuda:99'"):
        load_for_inference(tmp_path / "out", device="cuda:99")
