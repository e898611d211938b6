"""graphmoe convert: the source's format is found out, the summary says what was converted, errors say what to do."""

import dataclasses
import io
import json
import re

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer

from graphmoe_cli.runs.convert import run
from graphmoe_model.conversion import from_moe_peft, write_adapter
from graphmoe_model.demo.base import make_tokenizer
from tests.model.peer_format import peer_settings, write_peer
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.methods

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def converted(source, target, **options) -> str:
    """What is printed."""
    out = io.StringIO()
    run(source, target, console=Console(file=out, width=200), **options)
    return out.getvalue()


def test_the_summary(tmp_path):
    theirs = write_peer(tmp_path / "theirs", peer_settings("MIXLORA", act_fn="silu", expert_lora={"r": 3}))
    text = converted(theirs, tmp_path / "ours")
    facts = {
        "method": "MixLoRA",
        "rounds": "1",
        "rank, alpha": "4, 6",
        "other ranks": "3 in mlp",
        "experts": "3, of which 2 run per token",
        "layers": "2",
        "adapted per layer": "mlp, self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj",
        "tensors": "30",
        "parameters": f"{sum(t.numel() for t in from_moe_peft(theirs).tensors.values()):,}",
    }
    for name, value in facts.items():
        assert re.search(rf"^{name} +{re.escape(value)} *$", text, re.MULTILINE), name
    assert "other alphas" not in text
    assert "Note: act_fn is 'silu' there" in text
    assert text.rstrip().endswith(f"Written as graphmoe: {tmp_path / 'ours'}")


def test_every_source_and_every_target(tmp_path):
    """MoE-PEFT's, with rounds, back without them, and the attention alone; from ours and from theirs."""
    theirs = write_peer(tmp_path / "theirs", peer_settings("MIXLORA"))
    converted(theirs, tmp_path / "ours")
    expected = logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "ours"))
    for source in ("theirs", "ours"):
        text = converted(tmp_path / source, tmp_path / f"{source} rounds", rounds=2)
        assert "GraphMoE(MixLoRA)" in text
        config = json.loads((tmp_path / f"{source} rounds" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["rounds"]) == ("GRAPHMOE", 2)
    converted(tmp_path / "ours", tmp_path / "back", to="moe-peft")
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["peft_type"] == "MIXLORA"
    converted(tmp_path / "ours", tmp_path / "attention", to="attention-lora")
    assert json.loads((tmp_path / "attention/adapter_config.json").read_text())["peft_type"] == "LORA"
    converted(tmp_path / "back", tmp_path / "again", rounds=1)
    assert logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "again")).equal(expected)


def test_a_lora_becomes_pefts_own(tmp_path):
    """In safetensors, in the format that PEFT writes, without a word of GraphMoE."""
    converted(write_peer(tmp_path / "theirs", peer_settings("LORA")), tmp_path / "ours")
    text = converted(tmp_path / "ours", tmp_path / "peft", to="peft")
    assert "Note:" not in text
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == FILES
    settings = (tmp_path / "peft/adapter_config.json").read_text()
    assert json.loads(settings)["peft_type"] == "LORA"
    assert "graphmoe" not in settings.lower()


def test_a_copy_is_called_one(tmp_path):
    """Without --to and --rounds nothing is converted, which a user who wants PEFT's format must be told."""
    converted(write_peer(tmp_path / "theirs", peer_settings("LORA")), tmp_path / "ours")
    assert "Note: it was GraphMoE's already, and still is: --to peft" in converted(tmp_path / "ours", tmp_path / "copy")


@pytest.mark.parametrize("kind", ["MIXLORA", "LORAMOE", "MOLA"])
def test_experts_are_no_lora_of_pefts(kind, tmp_path):
    """Refused with every reason, and with what can be written in its place."""
    theirs = write_peer(tmp_path / "theirs", peer_settings(kind))
    with pytest.raises(ValueError, match=f"method='{kind.lower()}': a router weighs its experts") as refusal:
        converted(theirs, tmp_path / "peft", to="peft")
    assert ("--to attention-lora" in str(refusal.value)) == (kind == "MIXLORA")
    converted(theirs, tmp_path / "rounds", rounds=2)
    with pytest.raises(ValueError, match=r"rounds=2: it has no GRU"):
        converted(tmp_path / "rounds", tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


def test_an_adapter_is_upgraded_in_its_own_folder(tmp_path):
    """Read as a whole before anything is written."""
    folder = tmp_path / "ours"
    converted(write_peer(tmp_path / "theirs", peer_settings("MIXLORA")), folder)
    with pytest.raises(FileExistsError, match=r"is not empty; name a new folder, or add --overwrite$"):
        converted(folder, folder, rounds=2)
    converted(folder, folder, rounds=2, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    PeftModel.from_pretrained(tiny_model(), folder)


def test_what_the_user_can_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        converted(tmp_path / "nowhere", tmp_path / "out")
    theirs = write_peer(tmp_path / "theirs", peer_settings("MIXLORA"))
    with pytest.raises(ValueError, match="unknown format 'gguf'; there are graphmoe, peft, moe-peft, attention-lora"):
        converted(theirs, tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match="rounds=2 goes with the format 'graphmoe' alone"):
        converted(theirs, tmp_path / "out", to="moe-peft", rounds=2)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        converted(theirs, tmp_path / "out", rounds=0)
    (theirs / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(
        ValueError, match="peft_type 'IA3'; what can be converted is GRAPHMOE, MIXLORA, LORAMOE, MOLA, LORA"
    ):
        converted(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["graphmoe", "peft", "moe-peft", "attention-lora"])
def test_another_format_is_not_written_over_its_source(to, tmp_path):
    """Overwriting would delete what the adapter was converted from."""
    folder = write_peer(tmp_path / "theirs", peer_settings("MIXLORA"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is the source itself, which would be lost; name another target"):
        converted(folder, folder, to=to, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_summary_of_the_attention_counts_what_was_written(tmp_path):
    """Not the experts that were left behind."""
    theirs = write_peer(tmp_path / "theirs", peer_settings("MIXLORA"))
    text = converted(theirs, tmp_path / "attention", to="attention-lora")
    assert re.search(r"^tensors +16 *$", text, re.MULTILINE)
    assert "mlp" not in text.split("Note:")[0]
    assert re.search(r"^method +LoRA, PEFT's *$", text, re.MULTILINE)
    assert "rounds" not in text
    assert "experts" not in text


@pytest.mark.parametrize("to", ["graphmoe", "peft"])
def test_the_tokenizer_beside_an_adapter_comes_along(to, tmp_path):
    """`AutoTokenizer.from_pretrained(adapter)` is what the README loads it by. A run's state stays where it was."""
    theirs = write_peer(tmp_path / "theirs", peer_settings("LORA"))
    make_tokenizer(seed=0).save_pretrained(theirs)
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    (theirs / "training_args.bin").write_text("x")
    text = converted(theirs, tmp_path / "ours")
    assert "copied beside it: chat_template.jinja, tokenizer" in text
    target = tmp_path / "ours"
    if to == "peft":
        target = tmp_path / "peft"
        converted(tmp_path / "ours", target, to=to)
    assert AutoTokenizer.from_pretrained(target)("a b").input_ids
    assert (target / "chat_template.jinja").exists()
    assert not (target / "training_args.bin").exists()


def test_a_pattern_is_no_markup(tmp_path):
    """Printed as it is: rich took "[/q]" for a closing tag, and failed after the adapter had been written."""
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", peer_settings("MIXLORA")))
    config = dataclasses.replace(adapter.config, rank_pattern={"[/q]": 7, "[red]x": 3}, alpha_pattern={"[/]": 2})
    write_adapter(dataclasses.replace(adapter, config=config), tmp_path / "ours")
    text = converted(tmp_path / "ours", tmp_path / "copy")
    assert "7 in [/q], 3 in [red]x" in text
    assert "2 in [/]" in text
