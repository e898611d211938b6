"""`train`: what the loss and the optimizer get, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

from graphmoe_model.conversion import read_adapter
from graphmoe_model.questions import QuestionEncoder
from graphmoe_model.training import run_folder, train
from graphmoe_model.training.rows import make_collator, make_rows
from graphmoe_tables.recipe_files import recipe_of
from tests.model import training_runs
from tests.model.training_runs import make_questions, model_of, recipe, trained

QUESTIONS = make_questions(24)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return training_runs.make_base(tmp_path_factory.mktemp("base"))


def logs(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "loss" in log]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_on_the_answers_alone(base, tmp_path):
    """Computed here from raw logits: the cross entropy of each answer's token after its prompt, padding never counted,
    and the router loss beside it."""
    settings = {"batch": 8, "accumulation": 1, "max_steps": 1, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5}
    trained(base, tmp_path / "out", **settings)
    log = logs(tmp_path / "out")[0]

    run = recipe(base, tmp_path / "none", **settings).resolved()
    model, tokenizer = model_of(run).eval(), AutoTokenizer.from_pretrained(base)
    encoder = QuestionEncoder(tokenizer)
    losses = []
    for question in QUESTIONS:
        ids = torch.tensor([encoder.prompt_ids(question)])
        losses.append(-model(ids).logits[0, -1].log_softmax(-1)[encoder.label_token(question.label)].item())
    found = log["loss"] - 0.5 * log["aux_loss"]
    # which eight questions the step had is the sampler's; their mean is one of few
    sets = [sum(losses[i] for i in rows) / 8 for rows in _orders(len(QUESTIONS))]
    assert min(abs(found - mean) for mean in sets) < 1e-5
    assert 0 < log["aux_loss"] <= 1


def _orders(count: int) -> list[list[int]]:
    """The first eight rows as accelerate's sampler draws them, at the seed 0."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(count), data_seed=0)
    return [list(sampler)[:8]]


def test_rows_have_their_loss_where_it_was_asked_for(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = recipe(base, Path("x"))
    answers = make_rows(QUESTIONS, tokenizer, run, packing=False).dataset
    whole = make_rows(QUESTIONS, tokenizer, recipe(base, Path("x"), whole_sequence=True), packing=False).dataset
    assert all(sum(label != -100 for label in row["labels"]) == 1 for row in answers)
    assert all(row["labels"] == row["input_ids"] for row in whole)

    no_model = nn.Identity()  # it cannot leave logits out, so batches have every label
    batch = make_collator(tokenizer, no_model, packing=False)([answers[i] for i in range(8)])
    assert (batch["labels"] != -100).sum() == 8
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(answers[i]["input_ids"]) for i in range(8)]))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_packing_keeps_every_question_whole_and_apart(base):
    """Packed rows have all questions once; a forward over them gives the logits that each question has alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = recipe(base, Path("x"), max_length=64, lora_dropout=0.0).resolved()
    rows, packed = (make_rows(QUESTIONS, tokenizer, run, packing=p).dataset for p in (False, True))
    assert len(packed) < len(rows)
    parts = [
        (ids[start : start + length], labels[start : start + length])
        for ids, labels, lengths in zip(packed["input_ids"], packed["labels"], packed["seq_lengths"], strict=True)
        for start, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True)
    ]
    assert sorted(parts) == sorted(zip(rows["input_ids"], rows["labels"], strict=True))

    model = model_of(run).eval()
    batch = make_collator(tokenizer, nn.Identity(), packing=True)([packed[0], packed[1]])
    logits = model(**batch).logits[0]
    own = [own for i in (0, 1) for own in _split(packed[i])]
    expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in own])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole_sequence", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_logits_without_a_label_are_not_computed_and_change_nothing(base, packing, whole_sequence):
    """Loss and gradients are those of all logits; of those, as many positions are left as have a label."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = recipe(base, Path("x"), max_length=64, lora_dropout=0.0, whole_sequence=whole_sequence).resolved()
    rows = make_rows(QUESTIONS, tokenizer, run, packing=packing).dataset
    chosen = [rows[i] for i in range(3)]
    questions = sum(len(row["seq_lengths"]) for row in chosen) if packing else 3
    found = []
    for model in (model_of(run), model_of(run)):
        collator = make_collator(tokenizer, nn.Identity() if not found else model, packing=packing)
        batch = collator(chosen)
        outputs = model.train()(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((outputs, gradients, batch))
    (all_logits, expected, whole), (some, gradients, batch) = found
    assert (batch["labels"] != -100).sum() == (batch["labels"][:, 1:] != -100).sum()  # however a trainer counts
    assert (batch["labels"] != -100).sum() == (whole["labels"][:, 1:] != -100).sum()
    assert all_logits.logits.shape[1] == whole["input_ids"].shape[1]
    assert some.logits.shape[1] == batch["logits_to_keep"].numel()
    if not whole_sequence:
        assert some.logits.shape[1] <= questions
    torch.testing.assert_close(some.loss, all_logits.loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def _split(row: dict[str, list[int]]) -> list[list[int]]:
    parts, start = [], 0
    for length in row["seq_lengths"]:
        parts.append(row["input_ids"][start : start + length])
        start += length
    return parts


# ------------------------------------------------------------------------------------------------------- what comes out


def test_the_adapter_loads_with_all_that_was_said_of_it(base, tmp_path):
    """Weights, tokenizer, the recipe, the result with its conditions, the log of the experts' load."""
    folder = tmp_path / "out"
    result = trained(base, folder, held_out=5)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert model.peft_config["default"].rounds == 2
    AutoTokenizer.from_pretrained(folder)
    saved = json.loads((folder / "train_result.json").read_text(encoding="utf-8"))
    assert saved["steps"] == result.steps == 2
    assert saved["trainable_parameters"] == sum(tensor.numel() for tensor in weights(folder).values())
    assert saved["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert saved["peak_memory"] > 1e6
    assert {"device", "dtype", "threads", "processes", "seed", "torch", "transformers", "peft"} <= set(
        saved["conditions"]
    )
    lines = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line, log in zip(lines, logs(folder), strict=True):
        shares = torch.tensor(line["load"]["model.layers.0.mlp"])  # [T, n]
        torch.testing.assert_close(shares.sum(1), torch.ones(2))
        assert [log[f"expert_load_max/round_{i}"] for i in (1, 2)] == pytest.approx((4 * shares.max(1).values).tolist())
        assert log["aux_loss"] > 0


def test_the_saved_recipe_repeats_the_run(base, tmp_path):
    """Bit for bit, from the file alone but for the folder."""
    trained(base, tmp_path / "out")
    again = recipe_of({"output": str(tmp_path / "again")}, tmp_path / "out" / "recipe.yaml")
    train(again, QUESTIONS, say=lambda line: None)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two
    trained(base, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() != one


def test_the_best_checkpoint_is_what_is_saved(base, tmp_path):
    """At a rate that is too high an early evaluation is the best, and its adapter is the one in the folder."""
    folder = tmp_path / "out"
    settings = {"max_steps": 5, "learning_rate": 0.3, "lora_alpha": 64, "scheduler": "constant", "keep_checkpoints": 1}
    result = trained(base, folder, held_out=6, **settings)
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {log["step"]: log["eval_loss"] for log in state["log_history"] if "eval_loss" in log}
    assert len(losses) == 5
    best = min(losses, key=losses.__getitem__)
    assert best < 5, "the last is the best: this test shows nothing"
    assert (result.best_step, result.eval_loss) == (best, losses[best])
    kept = run_folder.checkpoints(folder)
    assert [path.name for path in kept] == [f"checkpoint-{best}", "checkpoint-5"]
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(kept[0])[name]), name


def test_the_last_step_is_logged_and_evaluated_whatever_the_intervals(base, tmp_path):
    result = trained(base, tmp_path / "out", held_out=4, max_steps=3, save_steps=2, logging_steps=100)
    assert [log["step"] for log in logs(tmp_path / "out")] == [1, 3]
    lines = (tmp_path / "out" / "expert_load.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [log["step"] for log in state["log_history"] if "eval_loss" in log] == [2, 3]
    assert result.last_loss is not None


def test_epochs_give_the_steps(base, tmp_path):
    """24 questions at 4 x 2 rows per step: three steps per epoch."""
    assert trained(base, tmp_path / "out", max_steps=None, epochs=1.5, save_steps=None).steps == 5


METHODS = ("lora", "mixlora", "graphmoe-loramoe", "graphmoe-moda")


@pytest.mark.parametrize("preset", METHODS)
def test_every_kind_of_method_trains(preset, base, tmp_path):
    """Those without a router too, of which no load is logged; with checkpointing as without."""
    given = {"preset": preset, "num_experts": None, "rounds": None, "gru_hidden_scale": None}
    if preset.startswith("graphmoe"):
        given |= {"gru_hidden_scale": 0.25}
    trained(base, tmp_path / "out", lora_dropout=0.0, **given)
    trained(base, tmp_path / "checkpointed", lora_dropout=0.0, gradient_checkpointing=True, **given)
    one, two = weights(tmp_path / "out"), weights(tmp_path / "checkpointed")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
    lines = (tmp_path / "out" / "expert_load.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == (0 if preset == "lora" else 2)


def test_packed_training(base, tmp_path):
    result = trained(base, tmp_path / "out", packing=True, max_length=48)
    assert result.last_loss is not None
    assert logs(tmp_path / "out")[0]["aux_loss"] > 0


def test_each_part_has_its_learning_rate(base, tmp_path):
    """At a rate of almost nothing a part stays where it began, and the others do not."""
    start = {
        n.replace(".default", ""): p.detach() for n, p in model_of(recipe(base, tmp_path).resolved()).named_parameters()
    }
    trained(base, tmp_path / "out", gru_learning_rate=1e-30, attention_learning_rate=1e-30)
    moved = {n for n, tensor in weights(tmp_path / "out").items() if (tensor - start[n]).abs().max() > 1e-20}
    assert moved
    assert not [name for name in moved if ".gru." in name or "self_attn" in name]
    assert any("router" in name for name in moved)
    with pytest.raises(ValueError, match="a learning rate for gru was given"):
        trained(base, tmp_path / "none", rounds=1, gru_hidden_scale=None, gru_learning_rate=1e-3)


# ---------------------------------------------------------------------------------------- from an adapter that is there

FRESH = dict.fromkeys(("r", "lora_alpha", "num_experts", "gru_hidden_scale", "rounds"))


def test_a_trained_mixlora_gets_rounds(base, tmp_path):
    """It starts where the adapter of one round is, as a fresh GRU adds nothing; then the GRU trains."""
    trained(base, tmp_path / "mixlora", rounds=1, gru_hidden_scale=None, seed=3)
    settings = {**FRESH, "start_from": str(tmp_path / "mixlora"), "rounds": 3, "gru_hidden_scale": 0.5}
    start = model_of(recipe(base, tmp_path / "x", **settings).resolved()).eval()
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "mixlora").eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(start(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)

    trained(base, tmp_path / "out", **settings)
    adapter = read_adapter(tmp_path / "out")
    assert (adapter.config.rounds, adapter.config.gru_hidden_scale, adapter.config.r) == (3, 0.5, 2)
    assert any(".gru.output_proj" in name and tensor.any() for name, tensor in adapter.tensors.items())


def test_an_adapter_is_trained_on_as_it_is(base, tmp_path):
    trained(base, tmp_path / "first")
    settings = {**FRESH, "start_from": str(tmp_path / "first")}
    start = dict(model_of(recipe(base, tmp_path / "x", **settings).resolved()).named_parameters())
    for name, tensor in weights(tmp_path / "first").items():
        (found,) = [p for n, p in start.items() if n.replace(".default", "") == name]
        assert torch.equal(found, tensor), name
    trained(base, tmp_path / "out", **settings)
    assert any(not torch.equal(t, weights(tmp_path / "first")[n]) for n, t in weights(tmp_path / "out").items())


def test_an_adapter_that_cannot_be_started_from(base, tmp_path):
    trained(base, tmp_path / "first")
    with pytest.raises(ValueError, match=r"--start-from .*first: this adapter has 2 rounds, and GRUs trained for them"):
        trained(base, tmp_path / "out", **{**FRESH, "start_from": str(tmp_path / "first"), "rounds": 3})
    with pytest.raises(ValueError, match=r"--start-from .*nowhere: "):
        trained(base, tmp_path / "out", **{**FRESH, "start_from": str(tmp_path / "nowhere")})


def test_an_adapter_of_another_base_needs_consent(base, tmp_path):
    """Else it would be trained on a model that it does not fit; with consent it is then this model's adapter."""
    trained(base, tmp_path / "first", rounds=1, gru_hidden_scale=None)
    other = tmp_path / "elsewhere"
    other.symlink_to(base)  # the same folder: no other base
    for rounds in (None, 2):
        settings = {**FRESH, "start_from": str(tmp_path / "first"), "rounds": rounds}
        assert model_of(recipe(other, tmp_path / "x", **settings).resolved())
        other = Path(shutil.copytree(base, tmp_path / f"copy {rounds}"))
        with pytest.raises(ValueError, match=rf"trained on the base model '{base}', and --model is '{other}'; name"):
            trained(other, tmp_path / "out", **settings)
        trained(other, tmp_path / f"out {rounds}", **settings, allow_other_base=True)
        assert read_adapter(tmp_path / f"out {rounds}").config.base_model_name_or_path == str(other)
        other = base


def test_an_adapter_of_another_kind_of_model_is_not_started_from(base, tmp_path):
    trained(base, tmp_path / "first")
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match="first is an adapter for SEQ_CLS; those of causal language models"):
        trained(base, tmp_path / "out", **{**FRESH, "start_from": str(tmp_path / "first")})
