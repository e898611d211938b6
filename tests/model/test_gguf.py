"""A base model in a GGUF file: what is read from it, and that an adapter trains and is evaluated on it."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

pytest.importorskip("gguf", reason="pip install 'graphmoe[gguf]'")
pytest.importorskip("trl", reason="pip install 'graphmoe[train]'")

from graphmoe_cli.evaluate_options import EvaluateOptions
from graphmoe_cli.runs import evaluate
from graphmoe_model.base_models import ModelSource, load_base_config, load_base_model, load_tokenizer, unpack, unpacking
from graphmoe_model.checkpoints import saved_adapter_config
from graphmoe_model.questions.json_lines import write_questions
from tests.model.gguf_files import BLOCK, FILE, FORMATS, llama_for, tensor_name, write_gguf
from tests.model.questions_made import byte_level, label_logits, made_questions
from tests.model.training_runs import trained

TOKENIZER = byte_level(special_first=False)


@pytest.fixture(scope="module")
def written() -> nn.Module:
    """The model before it was quantised."""
    return llama_for(TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def held(written, folder) -> nn.Module:
    """The model that the file holds."""
    return write_gguf(folder, written, TOKENIZER)


@pytest.fixture
def source(held, folder) -> ModelSource:
    return ModelSource(str(folder), gguf_file=FILE)


def test_weights_are_those_that_were_written(written, held, source):
    """Within the steps of each format, in the order of Transformers, and dense in fp32."""
    model = load_base_model(source)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == dict(written.named_parameters()).keys()
    for (name, weight), kept in zip(written.named_parameters(), held.parameters(), strict=True):
        found = loaded[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, kept, rtol=1e-6, atol=1e-6)
        if tensor_name(name) not in FORMATS:
            assert torch.equal(found, weight)
            continue
        bits = FORMATS[tensor_name(name)][1]
        largest = weight.detach().view(-1, BLOCK).abs().amax(1, keepdim=True)
        errors = (found - weight).detach().view(-1, BLOCK).abs() / largest
        assert 0 < errors.max() < 1.01 / 2 ** (bits - 1), name  # the scale is rounded too, to fp16


@pytest.mark.parametrize("adds_first", [True, False, None])
def test_a_first_token_is_never_left_out_unseen(adds_first, written, tmp_path):
    """Transformers 5.17 leaves it out of every text: such a file is refused. One that says nothing is read as it is."""
    write_gguf(tmp_path, written, TOKENIZER, adds_first=adds_first)
    source = ModelSource(str(tmp_path), gguf_file=FILE)
    made = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    puts_first = made("a")["input_ids"][0] == TOKENIZER.bos_token_id
    if adds_first and not puts_first:
        with pytest.raises(ValueError, match=r"says that every text begins with '<s>'.*install Transformers 5.23"):
            load_tokenizer(source)
    else:
        assert load_tokenizer(source)("a")["input_ids"] == made("a")["input_ids"]
        assert adds_first is None or puts_first == adds_first


def test_a_tokenizer_without_the_first_token_is_refused(written, tmp_path, monkeypatch):
    """Whatever the installed Transformers makes of the file."""
    write_gguf(tmp_path, written, TOKENIZER, adds_first=True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: TOKENIZER)
    with pytest.raises(ValueError, match="says that every text begins with"):
        load_tokenizer(ModelSource(str(tmp_path), gguf_file=FILE))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: byte_level(special_first=True))
    load_tokenizer(ModelSource(str(tmp_path), gguf_file=FILE))


def test_weights_are_unpacked_wherever_they_are_loaded(source, monkeypatch):
    """Transformers keeps them packed on a GPU that it has kernels for, in modules that are no linears."""
    asked = []
    read_header = GgufHfQuantizer.read_header

    def noting(quantizer: GgufHfQuantizer, file: str) -> None:
        asked.append(quantizer.quantization_config.dequantize)
        read_header(quantizer, file)

    monkeypatch.setattr(GgufHfQuantizer, "read_header", noting)
    load_base_model(source)
    assert asked == [True]


def test_the_loaded_model_computes_what_was_written(held, source):
    """Configuration, order of query and key rows, and the rotary base: all are in the logits."""
    ids = torch.tensor([TOKENIZER(made_questions(1)[0].prompt)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(load_base_model(source)(ids).logits, held(ids).logits, rtol=1e-4, atol=1e-4)
    config = load_base_config(source)
    for size in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(config, size) == pytest.approx(getattr(held.config, size)), size


def test_texts_have_the_ids_of_the_tokenizer_that_was_written(source):
    tokenizer = load_tokenizer(source)
    assert TOKENIZER.get_vocab().items() <= tokenizer.get_vocab().items()  # some releases of Transformers add one
    for question in made_questions(20):
        text = question.solved
        ids = TOKENIZER(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


def test_unpacked_it_is_the_same_model_for_everything(held, folder, source, tmp_path):
    """Weights, texts, and what Trainer and saving ask of a model; a second time nothing is done."""
    shutil.copy(folder / FILE, tmp_path)
    assert unpack(tmp_path, FILE, torch.float32)
    assert not unpack(tmp_path, FILE, torch.float32)
    assert not list(tmp_path.glob(".unpacked-*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = load_base_model(source).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert [name for name, weight in loaded.state_dict().items() if not torch.equal(weight, expected[name])] == []
    assert getattr(loaded, "quantization_method", None) is None
    made, again = load_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path)
    for question in made_questions(5):
        assert again(question.solved)["input_ids"] == made(question.solved)["input_ids"]
    loaded.save_pretrained(tmp_path / "saved")


def test_unpacking_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    shutil.copy(folder / FILE, tmp_path)
    monkeypatch.setattr(unpacking.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ValueError, match="cannot be written to: No space left"):
        unpack(tmp_path, FILE)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_adapter_trains_on_it_as_on_the_same_model_elsewhere(held, source, folder, tmp_path):
    """And is evaluated on it by its file: the answers are those of the model in memory with that adapter."""
    held.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    settings = {"learning_rate": 0.05, "max_steps": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not find a config file")  # PEFT's at each save
        from_file = trained(folder, tmp_path / "out", gguf_file=FILE, **settings)
    elsewhere = trained(tmp_path / "dense", tmp_path / "out of dense", **settings)
    assert from_file.last_loss is not None
    assert math.isfinite(from_file.last_loss)
    assert from_file.last_loss == pytest.approx(elsewhere.last_loss, rel=1e-4)
    assert saved_adapter_config(str(tmp_path / "out")).base_model_name_or_path == str(folder)

    questions = made_questions(12, seed=5)
    write_questions(tmp_path / "asked.jsonl", questions)
    options = EvaluateOptions(
        model=str(folder),
        gguf_file=FILE,
        adapter=str(tmp_path / "out"),
        data=(str(tmp_path / "asked.jsonl"),),
        device="cpu",
        output=tmp_path / "evaluation.json",
        records=tmp_path / "records.jsonl",
    )
    evaluate.run(options, Console(file=StringIO()))
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    untrained = [label_logits(held, TOKENIZER, question.prompt, question.answers) for question in questions]
    model = PeftModel.from_pretrained(held, str(tmp_path / "out")).eval()
    changes = []
    for question, record, before in zip(questions, records, untrained, strict=True):
        logits = label_logits(model, TOKENIZER, question.prompt, question.answers)
        assert record["first_token"] == int(logits.argmax())
        differences = torch.tensor(record["label_logprobs"]) - logits  # log-softmax: one constant for all
        assert float(differences.max() - differences.min()) < 1e-3
        changes.append(float((logits - before).abs().max()))
    assert max(changes) > 0.1  # the adapter counts
