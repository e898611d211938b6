"""The digest of a base model in a folder: what it notices, and what it does not."""

from __future__ import annotations

import pytest

from graphmoe_model.analysis.base_digest import ENDS, base_digest


def test_the_digest_of_a_base_is_of_its_configuration_and_of_the_ends_of_its_weights(tmp_path):
    assert base_digest("owner/name", None) is None
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    digests = [base_digest(str(tmp_path), None)]
    content = bytearray(3 * ENDS)
    for at in (0, ENDS - 1, 2 * ENDS, 3 * ENDS - 1):
        content[at] = 1
        weights.write_bytes(content)
        digests.append(base_digest(str(tmp_path), None))
    for path, text in ((config, "{}"), (tmp_path / "more.bin", ""), (weights, "short")):
        path.write_text(text)
        digests.append(base_digest(str(tmp_path), None))
    assert len(set(digests)) == len(digests)
    (tmp_path / "a.gguf").write_text("a")
    (tmp_path / "README.md").write_text("what it is")
    assert base_digest(str(tmp_path), None) == digests[-1]
    of_gguf = base_digest(str(tmp_path), "a.gguf")
    weights.unlink()
    assert base_digest(str(tmp_path), "a.gguf") == of_gguf != base_digest(str(tmp_path), None) != digests[-1]
    with pytest.raises(ValueError, match=r"the base model's file .*b\.gguf cannot be read: No such file"):
        base_digest(str(tmp_path), "b.gguf")
