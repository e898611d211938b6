"""Models and targets that cannot be adapted: refused with the reason, before anything has changed."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.attaching import adapted, attach, dense_and_sparse_model, refuse
from tests.model.tiny_models import logits, tiny_config, tiny_model


@pytest.mark.parametrize(
    "model_type, settings, message",
    [
        (
            "nemotron",
            {},
            r"model.layers.{0, 1}.mlp: NemotronMLP is not a gated MLP.*up_proj, down_proj, act_fn",
        ),
        ("starcoder2", {}, "Starcoder2MLP is not a gated MLP.*c_fc, c_proj, act"),
        ("gpt_neox", {}, "gpt_neox.layers.{0, 1}.mlp.*GPTNeoXMLP is not a gated MLP"),
        ("mixtral", {"num_local_experts": 2}, "MixtralSparseMoeBlock is not a gated MLP.*sparse expert blocks"),
        (
            "gemma3n_text",
            {
                **{"head_dim": 8, "activation_sparsity_pattern": [0.95, 0.0], "vocab_size_per_layer_input": 64},
                **{
                    "hidden_size_per_layer_input": 8,
                    "num_kv_shared_layers": 0,
                    "laurel_rank": 4,
                    "altup_num_inputs": 2,
                },
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "model.layers.0.mlp: Gemma3nTextMLP makes its activations sparse",
        ),
        ("bitnet", {}, "BitNetMLP has the submodules ffn_sub_norm beside"),
        (
            "falcon_h1",
            {
                **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
                "mlp_multipliers": [1.2, 0.7],
            },
            "layers.{0, 1}.feed_forward.*FalconH1MLP computes something else than",
        ),
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 2, "n_head": 4},
            r"found no decoder layers.*GPT2Block\(ln_1, attn, ln_2, mlp\)",
        ),
        ("opt", {"ffn_dim": 48}, r"have no MLP module to adapt.*OPTDecoderLayer\(self_attn"),
    ],
)
def test_models_without_a_supported_mlp_are_refused_with_reasons(model_type, settings, message):
    """The message names the modules that were seen, their classes, and what is wrong with each."""
    refuse(tiny_model(model_type, **settings), ValueError, f"(?s){message}")


def test_a_model_of_dense_and_sparse_layers_can_be_adapted_in_part():
    """DeepSeek-V3 begins with dense layers: refused as a whole, adapted where the config keeps to them."""
    refuse(dense_and_sparse_model(), ValueError, "model.layers.1.mlp: DeepseekV3MoE is not a gated MLP")
    ffns, loras = adapted(attach(dense_and_sparse_model(), layers_to_transform=[0]))
    assert ffns == {"model.layers.0.mlp"}
    projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert loras == {f"model.layers.0.self_attn.{name}" for name in projections}
    ffns, loras = adapted(attach(dense_and_sparse_model(), exclude_modules=["layers.1.mlp"]))
    assert ffns == {"model.layers.0.mlp"}
    assert len(loras) == 10


@pytest.mark.parametrize(
    "targets, error, message",
    [
        (["q_proj", "up_proj", "down_proj"], ValueError, "only linears inside one.*name the MLP.*called mlp"),
        (["q_proj"], ValueError, "selects no gated MLP.*the model's gated MLPs are called mlp"),
        (["mlp", "gate_proj"], ValueError, "model.layers.0.mlp.gate_proj, which lies inside model.layers.0.mlp"),
        (["mlp", "self_attn"], TypeError, "model.layers.0.self_attn: LlamaAttention is not a gated MLP"),
        (["nothing"], ValueError, "no module is called nothing"),
    ],
)
def test_targets_that_make_no_graphmoe_model_are_refused(targets, error, message):
    refuse(tiny_model(), error, message, target_modules=targets)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"target_modules": ["nothing", "void"]},
            "no module is called nothing, void; there are .*down_proj, .*up_proj",
        ),
        ({"target_modules": "nothing"}, "target_modules='nothing' selects no gated MLP"),
        (
            {"target_modules": "mlp"},
            r"a string is a regular expression of whole names, a list has their ends: \['mlp'\] or",
        ),
        ({"exclude_modules": ["mlp"]}, "no MLP of LlamaForCausalLM is left to adapt"),
        (
            {"layers_to_transform": [7]},
            r"no MLP of LlamaForCausalLM is left to adapt after layers_to_transform=\[7\]: its decoder layers are "
            r"model\.layers\.0 to model\.layers\.1",
        ),
        (
            {"target_modules": ["mlp"], "exclude_modules": ["mlp"]},
            r"no gated MLP: it means model.layers.{0, 1}.mlp, left out by exclude_modules=\['mlp'\]; for LoRA",
        ),
        (
            {"target_modules": ["mlp"], "layers_to_transform": 0, "exclude_modules": r".*layers\.0.*"},
            r"left out by exclude_modules='.*' and layers_to_transform=0; for LoRA",
        ),
        ({"target_modules": ["mlp"], "modules_to_save": ["mlp"]}, r"left out by modules_to_save=\['mlp'\]"),
        ({"target_modules": ["mlp"], "layers_to_transform": [7]}, r"left out by layers_to_transform=\[7\]"),
    ],
)
def test_targets_that_select_nothing(settings, message):
    """PEFT's own class of error, for programs that catch it and go on without the adapter."""
    refuse(tiny_model(), NoMatchingPeftModuleError, message, **settings)


def test_no_name_is_left_out_of_a_message():
    """Modules that end in a digit, and each layer by its number: the one that is needed may be among them."""
    model = tiny_model()
    model.fc1 = nn.Linear(4, 4)
    refuse(model, ValueError, r"there are .*\bfc1\b.*q_proj", target_modules=["mlp", "void"])
    deep = tiny_model("nemotron", num_hidden_layers=12)
    refuse(deep, ValueError, r"model.layers.{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}.mlp: NemotronMLP is not a gated MLP")


def test_layers_that_do_not_exist_are_named():
    refuse(tiny_model(), ValueError, r"layers without any target module: \[7\]", layers_to_transform=[1, 7])


def test_nothing_left_after_exclusions():
    refuse(tiny_model(), ValueError, "no MLP of LlamaForCausalLM is left to adapt", exclude_modules=["mlp"])


class ClampedMLP(nn.Module):
    """What Step-3 and DeepSeek-V4 do: nothing in its attributes says so, small inputs do not show it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_mlp_is_found_out(dtype):
    model = tiny_model().to(dtype)
    model.model.layers[1].mlp = ClampedMLP(model.model.layers[1].mlp)
    refuse(model, ValueError, "model.layers.1.mlp: ClampedMLP computes something else than")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_mlp_passes_in_every_dtype(dtype):
    """The check of an MLP's output must not refuse rounding, nor leave a trace in the random numbers or the modes."""
    model = tiny_model().to(dtype)
    state = torch.get_rng_state()
    attach(model, init_lora_weights=False)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    get_peft_model(tiny_model().to(dtype), tiny_config(init_lora_weights=False))
    assert torch.equal(torch.get_rng_state(), expected)
    assert not any(module.training for module in model.model.layers[0].mlp.base_layer.modules())


def test_a_forward_patched_on_the_instance_is_refused():
    """Liger-Kernel's patch of an existing model puts a bound method into the MLP's __dict__."""
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.__dict__["forward"] = types.MethodType(lambda self, x: self.down_proj(x), mlp)
    refuse(model, ValueError, "forward of this LlamaMLP was replaced on the instance.*Liger")


def test_a_forward_patched_onto_the_layer_says_what_to_do():
    """The same patch applied after attaching looks for gate_proj on the GraphMoE layer."""
    model = attach(tiny_model())
    layer = model.base_model.model.model.layers[0].mlp
    layer.__dict__["forward"] = types.MethodType(lambda self, x: self.gate_proj(x), layer)
    with pytest.raises(AttributeError, match=r"FusedGraphMoEFFN has no gate_proj of its own.*Liger"):
        logits(model)


def test_accelerate_hooks_are_no_patch():
    """device_map puts a hook, and with it a new forward, on every module."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model()
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert torch.allclose(logits(attach(model)), logits(tiny_model()), atol=1e-5)


def test_offloaded_weights_are_refused_when_they_are_needed():
    """accelerate keeps offloaded weights on the meta device; products of them cannot be computed."""
    from accelerate import cpu_offload

    model = tiny_model()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"weights hold no data \(meta device\).*offloaded"):
        logits(attach(model))


def test_a_wrapped_mlp_is_refused():
    """Another adapter's LoRA on an MLP's linears, or on the model at all."""
    model = tiny_model()
    get_peft_model(model, LoraConfig(target_modules=["gate_proj"]))
    with (
        pytest.warns(UserWarning, match="a second time"),
        pytest.raises(ValueError, match=r"cannot be combined with the LoraConfig adapter.*unload\(\)"),
    ):
        get_peft_model(model, tiny_config(), adapter_name="second")
    assert list(model.peft_config) == ["default"]

    layer = tiny_model().model.layers[0].mlp
    layer.gate_proj = get_peft_model(nn.Sequential(layer.gate_proj), LoraConfig(target_modules=["0"])).base_model.model[
        0
    ]
    with pytest.raises(TypeError, match=r"LlamaMLP.gate_proj is wrapped by another adapter \(Linear\)"):
        FusedGraphMoEFFN(layer, tiny_config())
    with pytest.raises(TypeError, match="wrapped already"):
        FusedGraphMoEFFN(FusedGraphMoEFFN(tiny_model().model.layers[0].mlp, tiny_config()), tiny_config())


def test_tensor_parallel_weights_are_refused(tmp_path):
    """A DTensor holds a part of the weight on each device."""
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = tiny_model()
        linear = model.model.layers[0].mlp.up_proj
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Replicate()]))
        refuse(model, TypeError, r"layers.0.mlp.up_proj.weight is split over devices by tensor parallelism.*tp_plan")
    finally:
        distributed.destroy_process_group()


def test_a_misspelt_target_is_refused_by_name():
    """PEFT passes over what matches nothing, and the attention would silently get no adapter."""
    with pytest.raises(ValueError, match=r"no module is called q_prj; there are .*q_proj"):
        attach(tiny_model(), target_modules=["q_prj", "mlp"])
