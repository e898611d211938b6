"""Base models that accelerate offloads, to the CPU's memory or to disk: attached, run, trained, saved, loaded.

The device that computes is the CPU: accelerate's hooks bring each weight from the meta device and put it back there, as
they do on a GPU. What is offloaded has no data between forwards, so whoever reads it then fails or computes nonsense.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.storage.offloading import is_offloaded, onloaded
from tests.model.checkpointing import checkpoint_activations
from tests.model.method_models import adapted, config, randomise, trained_parameters
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tokens

PREFIX = "base_model.model."
SAME = 1e-5  # folded against literal rounds, in fp32
COMMON = {"model.embed_tokens": "cpu", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
FIRST_LAYER = {**COMMON, "model.rotary_emb": "cpu", "model.layers.0": "disk"}


def offloaded(model, where, folder, prefix=""):
    """The model with everything offloaded to the CPU, or its first layer to disk."""
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    device_map = {prefix + name: device for name, device in FIRST_LAYER.items()}
    return dispatch_model(model, device_map, offload_dir=folder)


class Plain:
    """A model of a form with nothing offloaded, and what the others have to equal.

    Attributes:
        adapter: the adapter's tensors.
        y, gradients: logits, and the gradients of a training step.
    """

    def __init__(self, form: str) -> None:
        self.form, self.model = form, adapted(form)
        randomise(self.model)
        self.adapter = {n: t.clone() for n, t in self.model.state_dict().items() if "lora_" in n}
        self.y, self.gradients = logits(self.model), step(self.model)
        self.model.eval()

    def onto(self, base, **options):
        """An equal adapter on another base."""
        model = adapted(self.form, base, **options)
        model.load_state_dict(self.adapter, strict=False)
        return model


def step(model):
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in trained_parameters(model).items()}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or relative_error(found[name], gradient) <= SAME, name


@pytest.fixture(scope="module")
def plain():
    return Plain("graphmoe-mixdora")


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    """Folders of a base model and of the adapter."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder / "base")
    plain.onto(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return folder


# By default those that together have every kind of layer: LoRA with DoRA, experts on linears, routers of every kind.
USUAL = ("graphmoe-mixdora", "graphmoe-moda")


@pytest.mark.methods
@pytest.mark.parametrize(
    "form", [form if form in USUAL else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_every_method_computes_and_trains_as_before(form, tmp_path):
    """Attached to an offloaded base: outputs, gradients, and the base model's output with adapters disabled."""
    plain = Plain(form)
    model = plain.onto(offloaded(tiny_model(), "disk", tmp_path))
    assert model.get_base_model().model.layers[0].mlp.base_layer.down_proj.weight.is_meta
    for _ in range(2):
        assert relative_error(logits(model), plain.y) <= SAME
    assert_equal_gradients(step(model), plain.gradients)
    with model.disable_adapter(), plain.model.disable_adapter():
        assert torch.equal(logits(model), logits(plain.model))


def test_attached_before_it_is_offloaded(plain, tmp_path):
    """Then the adapter is offloaded with the base, and brought with it."""
    for where in ("disk", "cpu"):
        model = plain.onto(tiny_model())
        offloaded(model, where, tmp_path, PREFIX)
        assert model.get_base_model().model.layers[0].mlp.lora_graphmoe["default"].router.weight.is_meta
        for _ in range(2):
            assert relative_error(logits(model), plain.y) <= SAME


def test_no_fold_is_kept_of_weights_that_come_and_go(plain, tmp_path):
    """It would hold what was brought for one forward, and be built again in the next."""
    model = plain.onto(tiny_model())
    logits(model)
    layers = [module for module in model.modules() if isinstance(module, FusedGraphMoEFFN)]
    assert all(layer._folds["default"].fold is not None for layer in layers)
    offloaded(model, "disk", tmp_path, PREFIX)
    logits(model)
    assert [layer._folds["default"].fold is None for layer in layers] == [True, False]


def test_a_fresh_adapter_changes_nothing(tmp_path):
    """DoRA's magnitudes start at the norms of weights that have no data when the adapter is attached."""
    base = offloaded(tiny_model(), "cpu", tmp_path)
    model = get_peft_model(base, config("graphmoe-mixdora", init_lora_weights=True))
    assert relative_error(logits(model), logits(tiny_model())) <= SAME
    assert not any(p.is_meta for p in trained_parameters(model).values())


def test_an_mlp_is_compared_with_what_it_should_compute(tmp_path):
    """Its weights are brought for that: an unknown step in its forward is found on a base that is offloaded, too."""

    def clamped(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=0.1))

    base = tiny_model()
    kind = type(base.model.layers[0].mlp)
    base.model.layers[0].mlp.__class__ = type("ClampedMLP", (kind,), {"forward": clamped})
    offloaded(base, "disk", tmp_path)
    with pytest.raises(ValueError, match="ClampedMLP computes something else"):
        get_peft_model(base, tiny_config())


def test_one_linear_of_an_mlp_alone(plain, tmp_path):
    """infer_auto_device_map splits layers where nobody tells it which classes to leave whole."""
    device_map = {**COMMON, "model.rotary_emb": "cpu", "model.layers.0.mlp.gate_proj": "disk"}
    rest = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")
    device_map |= {f"model.layers.0.{name}": "cpu" for name in rest}
    model = plain.onto(dispatch_model(tiny_model(), device_map, offload_dir=tmp_path))
    assert relative_error(logits(model), plain.y) <= SAME


def test_checkpointing_brings_weights_again(plain, tmp_path):
    """Without it all that was brought stays in memory until its backward pass; with it, one layer's."""
    model = plain.onto(offloaded(tiny_model(), "disk", tmp_path))
    checkpoint_activations(model)
    model.enable_input_require_grads()
    assert_equal_gradients(step(model), plain.gradients)


def test_weights_are_put_back_after_an_error(plain, tmp_path):
    """An interrupted forward must not leave the layer's weights on the device, and its linears without their hooks."""
    model = plain.onto(offloaded(tiny_model(), "disk", tmp_path))
    layer = model.get_base_model().model.layers[0].mlp
    with contextlib.suppress(ZeroDivisionError), onloaded(layer):
        assert not layer.base_layer.up_proj.weight.is_meta
        with onloaded(layer.base_layer):  # what is there already stays
            pass
        assert not layer.base_layer.up_proj.weight.is_meta
        _ = 1 / 0
    assert layer.base_layer.up_proj.weight.is_meta
    assert relative_error(logits(model), plain.y) <= SAME


def test_an_offloaded_adapter_is_not_trained(plain, tmp_path):
    """Its gradients would go to copies that are thrown away; accelerate would not say so."""
    model = plain.onto(tiny_model())
    offloaded(model, "disk", tmp_path, PREFIX)
    with pytest.raises(
        RuntimeError, match=r"the adapter's own weights are offloaded \(.*Dispatch the base model first"
    ):
        step(model)
    model.add_adapter("second", config("graphmoe-mixdora"))  # its weights are on the device
    model.set_adapter("second")
    assert None not in step(model).values()


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=lambda own: next(iter(own))
)
def test_offloaded_modules_are_not_trained_beside_the_adapter(options, tmp_path):
    """PEFT would train a copy without data, and save it."""
    base = offloaded(tiny_model(), "cpu", tmp_path)
    with pytest.raises(ValueError, match=r"(lm_head|embed_tokens) is offloaded by accelerate.*keep it on a device"):
        get_peft_model(base, tiny_config(**options))


def test_saved_and_loaded_by_every_loader(plain, saved, tmp_path):
    """Transformers offloads the base while it loads it. PEFT alone would end in a KeyError, Transformers with the
    adapter's first values for what is on disk."""
    base, adapter = saved / "base", saved / "adapter"

    def from_disk(folder=base, loader=AutoModelForCausalLM):
        return loader.from_pretrained(folder, device_map=FIRST_LAYER, offload_folder=tmp_path / "offloaded")

    loaded = from_disk()
    loaded.load_adapter(adapter)
    models = {
        "PeftModel": PeftModel.from_pretrained(from_disk(), adapter),
        "PeftModel, offload_dir": PeftModel.from_pretrained(from_disk(), adapter, offload_dir=tmp_path / "further"),
        "cpu_offload": PeftModel.from_pretrained(offloaded(tiny_model(), "cpu", tmp_path), adapter),
        "AutoPeftModel": from_disk(adapter, AutoPeftModelForCausalLM),
        "AutoModel": from_disk(adapter),
        "load_adapter": loaded,
    }
    for name, model in models.items():
        assert is_offloaded(model), name
        assert relative_error(logits(model), plain.y) <= SAME, name
    models["PeftModel"].save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "again")), plain.y)
    assert models["PeftModel"].hf_device_map == FIRST_LAYER


def test_loading_is_refused_where_it_would_do_nothing(plain, saved, tmp_path):
    """Into an adapter that is offloaded, and with a device map that is not the base's."""
    model = plain.onto(tiny_model())
    offloaded(model, "cpu", tmp_path, PREFIX)
    with pytest.raises(ValueError, match=r"the adapter 'default' is offloaded itself.*dispatch the base model first"):
        model.load_adapter(saved / "adapter", "default")
    base = offloaded(tiny_model(), "disk", tmp_path)
    with pytest.raises(ValueError, match=r"is not the one that the base model was loaded with.*leave it out here"):
        PeftModel.from_pretrained(base, saved / "adapter", device_map={"": "cpu"})
    assert base.hf_device_map == FIRST_LAYER


def test_trainer(plain, tmp_path):
    """Trainer's steps on an offloaded base are those on any other."""
    data = [{"input_ids": row, "labels": row} for row in tokens(4)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    losses = []
    for base in (tiny_model(), offloaded(tiny_model(), "disk", tmp_path)):
        trainer = Trainer(plain.onto(base), TrainingArguments(tmp_path / "out", **settings), train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
