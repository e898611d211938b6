"""The recipe of a training run: every option of ``graphmoe train``, with the paper's values as defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graphmoe_tables.methods import METHODS, preset_settings
from graphmoe_tables.recipe_fields import checked, field_of, flag, option

MODEL, DATA, ADAPTER = "Model", "Data", "Adapter"
OPTIMIZATION, DEVICES, OUTPUT = "Optimization", "Devices and memory", "Output"

DEFAULT_PRESET = "graphmoe-mixlora"
# Fields of a GraphMoEConfig that a preset sets and a recipe may overrule.
ADAPTER_FIELDS = (
    *("rounds", "r", "lora_alpha", "lora_dropout", "num_experts", "top_k", "use_dora", "gru_hidden_scale"),
    *("router_aux_loss_coef", "router_aux_loss_scope", "router_aux_loss", "norm_topk_prob"),
    *("candidate_input", "candidate_activation", "use_rslora", "target_modules"),
)
# What a trained adapter can be given when training starts from it.
_WITH_START = ("rounds", "gru_hidden_scale")
# What may differ when a run is resumed: nothing of it changes what is computed.
FREE_ON_RESUME = ("output", "logging_steps", "keep_checkpoints", "report_to")


@dataclass(frozen=True)
class TrainingRecipe:
    """All that a training run is made of, but for the machine.

    The defaults are the paper's (GraphMoE, Table 2): AdamW at 2e-4, 16 rows per batch and 8 batches per step, 2 epochs,
    512 tokens, and of the preset ``graphmoe-mixlora`` dropout 0.05, r 16, alpha 32, 8 experts, top 2, T = 3, a GRU of
    0.1 of the hidden size and a router loss of weight 0.01. What the table does not name (schedule, clipping, decay) is
    Transformers' default.

    ``model``, ``data`` and ``output`` have to be given. `graphmoe train --help` says what each field means.

    Raises:
        ValueError: a value out of range or of another type, one that is missing, or fields that exclude each other.
            The message names field, option, value, what was expected and what to do.
    """

    model: str = option(str, MODEL, "The base model: a folder, or its name on the hub.", "")
    gguf_file: str | None = option(str, MODEL, "A GGUF file in the model's folder or repository.", unset="none")
    load_in_4bit: bool = option(bool, MODEL, "Hold the base in 4 bits (nf4, by bitsandbytes).", False)
    load_in_8bit: bool = option(bool, MODEL, "Hold the base in 8 bits (int8, by bitsandbytes).", False)
    start_from: str | None = option(
        str,
        MODEL,
        "Train a saved adapter on: its folder. With --rounds, one of one round gets fresh GRUs.",
        unset="none",
    )
    allow_other_base: bool = option(
        bool, MODEL, "Also train on, by --start-from, an adapter that names another base than --model.", False
    )

    data: tuple[str, ...] = option(tuple, DATA, "Questions to train on: tasks, or JSONL files; several of them.", ())
    eval_data: tuple[str, ...] | None = option(
        tuple, DATA, "Questions whose loss chooses the best checkpoint: tasks, or JSONL files.", unset="none"
    )
    max_length: int = option(
        int, DATA, "Tokens of a question with its answer; longer ones lose their start.", 512, least=16
    )
    whole_sequence: bool = option(bool, DATA, "Take the loss on every token instead of on the answer alone.", False)
    packing: bool = option(bool, DATA, "Put several questions into one row of --max-length tokens.", False)

    preset: str | None = option(str, ADAPTER, "The papers' settings, as in graphmoe params.", unset=DEFAULT_PRESET)
    rounds: int | None = option(int, ADAPTER, "Rounds T; 1 is the method without a GRU.", least=1, unset="the preset's")
    r: int | None = option(int, ADAPTER, "LoRA rank.", least=1, unset="the preset's")
    lora_alpha: int | None = option(int, ADAPTER, "LoRA scale: s = alpha / r.", least=1, unset="the preset's")
    lora_dropout: float | None = option(
        float, ADAPTER, "Dropout on the input of every A.", least=0, most=0.99, unset="the preset's"
    )
    num_experts: str | None = option(
        str, ADAPTER, "Experts per layer: 8, or a pattern as 2-4-6-8 for equal groups of layers.", unset="the preset's"
    )
    top_k: int | None = option(int, ADAPTER, "Experts per token.", least=1, unset="the preset's")
    use_dora: bool | None = option(bool, ADAPTER, "DoRA's magnitudes.", unset="the preset's")
    gru_hidden_scale: float | None = option(
        float, ADAPTER, "GRU width as a share of the hidden size.", above=0, most=16, unset="the preset's"
    )
    router_aux_loss_coef: float | None = option(
        float, ADAPTER, "Weight of the router's load-balance loss; 0 turns it off.", least=0, unset="the method's"
    )
    router_aux_loss_scope: str | None = option(
        str,
        ADAPTER,
        "Whose tokens that loss counts: of all processes, which then train as one, or each its own.",
        choices=("global", "local"),
        unset="global",
    )
    router_aux_loss: str | None = option(
        str,
        ADAPTER,
        "That loss: of the chosen experts' weights (Eq. 8), or of all probabilities.",
        choices=("paper", "switch"),
        unset="paper",
    )
    norm_topk_prob: bool | None = option(
        bool, ADAPTER, "Divide the chosen routing weights by their sum.", unset="the preset's"
    )
    candidate_input: str | None = option(
        str,
        ADAPTER,
        "What the GRU's candidate reads: the experts' output (Eq. 6), or the state (Algorithm 1).",
        choices=("expert_output", "hidden_state"),
        unset="expert_output",
    )
    candidate_activation: str | None = option(
        str, ADAPTER, "Of the GRU's candidate.", choices=("sigmoid", "tanh"), unset="sigmoid"
    )
    use_rslora: bool | None = option(bool, ADAPTER, "Scale by alpha / sqrt(r) instead of alpha / r.", unset="false")
    target_modules: tuple[str, ...] | None = option(
        tuple,
        ADAPTER,
        "What the adapter is on: mlp, and names of linears for LoRA beside it.",
        unset="attention and MLPs",
    )

    batch: int = option(int, OPTIMIZATION, "Rows per batch, of all processes together.", 16, least=1)
    accumulation: int = option(int, OPTIMIZATION, "Batches per step.", 8, least=1)
    epochs: float = option(float, OPTIMIZATION, "Passes over the questions.", 2.0, above=0)
    max_steps: int | None = option(int, OPTIMIZATION, "Steps, in place of --epochs.", least=1, unset="as --epochs says")
    learning_rate: float = option(float, OPTIMIZATION, "Of AdamW.", 2e-4, above=0, most=1)
    expert_learning_rate: float | None = option(
        float, OPTIMIZATION, "Of the experts.", above=0, most=1, unset="--learning-rate"
    )
    router_learning_rate: float | None = option(
        float, OPTIMIZATION, "Of the routers.", above=0, most=1, unset="--learning-rate"
    )
    gru_learning_rate: float | None = option(
        float, OPTIMIZATION, "Of the GRUs.", above=0, most=1, unset="--learning-rate"
    )
    attention_learning_rate: float | None = option(
        float, OPTIMIZATION, "Of what is on the attention projections.", above=0, most=1, unset="--learning-rate"
    )
    scheduler: str = option(
        str, OPTIMIZATION, "How the learning rate falls.", "linear", choices=("linear", "cosine", "constant")
    )
    warmup: float = option(
        float, OPTIMIZATION, "Share of the steps in which the rate rises from 0.", 0.0, least=0, most=0.9
    )
    weight_decay: float = option(float, OPTIMIZATION, "AdamW's.", 0.0, least=0, most=1)
    max_grad_norm: float = option(float, OPTIMIZATION, "Gradients are scaled down to it; 0: never.", 1.0, least=0)
    seed: int = option(
        int, OPTIMIZATION, "Of fresh weights, dropout and the order of rows.", 0, least=0, most=2**32 - 1
    )

    use_cpu: bool = option(bool, DEVICES, "Train on the CPU although there is a GPU.", False)
    bf16: bool | None = option(
        bool, DEVICES, "Hold the base, and compute, in bf16.", unset="true on a GPU that has it, else false"
    )
    gradient_checkpointing: bool | None = option(
        bool, DEVICES, "Run each layer again in the backward pass, which saves its activations.", unset="true on a GPU"
    )
    fsdp: bool = option(bool, DEVICES, "Split everything over the processes by FSDP2 (torchrun).", False)
    deepspeed: str | None = option(str, DEVICES, "DeepSpeed's JSON file, such as zero2.json (torchrun).", unset="none")

    output: str = option(str, OUTPUT, "The folder of the adapter: new, or empty.", "")
    save_steps: int | None = option(
        int, OUTPUT, "Steps from one checkpoint, and evaluation, to the next.", least=1, unset="a tenth of the run"
    )
    keep_checkpoints: int = option(int, OUTPUT, "Checkpoints that are kept, beside the best.", 2, least=1)
    logging_steps: int = option(int, OUTPUT, "Steps from one log entry to the next.", 10, least=1)
    report_to: str = option(
        str,
        OUTPUT,
        "Where else the logs go; auto: to TensorBoard where it is installed.",
        "auto",
        choices=("auto", "none", "tensorboard", "wandb", "mlflow", "trackio"),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field.name, field_of(field), field.default, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name, what in (
            ("model", "the base model"),
            ("data", "what to train on"),
            ("output", "the adapter's folder"),
        ):
            if not getattr(self, name):
                raise ValueError(f"name {what} by {flag(name)}, or as {name} in the file of --config")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that exclude each other."""
        both = [
            ("load_in_4bit", "load_in_8bit", "the base is held in one of them"),
            ("gguf_file", "load_in_4bit", "a GGUF file's weights are made dense as they are read"),
            ("gguf_file", "load_in_8bit", "a GGUF file's weights are made dense as they are read"),
            ("fsdp", "deepspeed", "one of them splits the model"),
            ("fsdp", "use_cpu", "models are split over GPUs"),
            ("deepspeed", "use_cpu", "models are split over GPUs"),
            ("fsdp", "load_in_8bit", "FSDP2 splits floating dtypes only; --load-in-4bit stores them in bf16"),
        ]
        for first, second, why in both:
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"{flag(first)} and {flag(second)} exclude each other: {why}; leave one out")
        if self.allow_other_base and self.start_from is None:
            raise ValueError("--allow-other-base is about the adapter of --start-from, and none was given")
        if self.start_from is None:
            preset_settings(self.preset or DEFAULT_PRESET)
            return
        given = [name for name in ("preset", *ADAPTER_FIELDS) if getattr(self, name) is not None]
        wrong = [name for name in given if name not in _WITH_START]
        if wrong:
            raise ValueError(
                f"--start-from has the adapter's own settings; leave out {', '.join(map(flag, wrong))} "
                f"({' and '.join(map(flag, _WITH_START))} go with it)"
            )
        if self.gru_hidden_scale is not None and self.rounds is None:
            raise ValueError("--gru-hidden-scale is of fresh GRUs: with --start-from it needs --rounds of 2 or more")

    def resolved(self) -> TrainingRecipe:
        """Return the same recipe with the preset's values in the place of what was left out."""
        if self.start_from is not None:
            return self
        preset = self.preset or DEFAULT_PRESET
        settings: dict[str, Any] = dict(preset_settings(preset))
        method = METHODS[settings["method"]]
        settings["router_aux_loss_coef"] = method.router_aux_loss_coef if method.router_aux_loss_coef else None
        given = {name: getattr(self, name) for name in ADAPTER_FIELDS}
        if given["num_experts"] is None and "num_experts" in settings:
            settings["num_experts"] = str(settings["num_experts"])
        coefficient = given["router_aux_loss_coef"]
        has_loss = settings["router_aux_loss_coef"] if coefficient is None else coefficient
        settings["router_aux_loss_scope"] = "global" if has_loss else None
        if given["rounds"] == 1:
            settings.pop("gru_hidden_scale", None)
        filled: dict[str, Any] = {n: settings.get(n) if value is None else value for n, value in given.items()}
        return dataclasses.replace(self, preset=preset, **filled)

    def adapter_settings(self) -> dict[str, Any]:
        """Return the fields of a `GraphMoEConfig` that are set, beside the preset's."""
        settings = {name: getattr(self, name) for name in ADAPTER_FIELDS if getattr(self, name) is not None}
        experts = settings.get("num_experts", "")
        if "target_modules" in settings:
            settings["target_modules"] = list(settings["target_modules"])
        return settings | ({"num_experts": int(experts)} if experts.isdecimal() and len(experts) < 20 else {})
