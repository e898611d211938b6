"""Command lines of ``graphmoe``: options and values that a person could mean, and any others."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from graphmoe_tables.recipe import TrainingRecipe
from graphmoe_tables.recipe_fields import Field, field_of, flag

PARAMS: dict[str, list[str]] = {
    "--preset": ["mixlora", "graphmoe-mola", "all", "lora", "nothing", ""],
    "--method": ["mixlora", "mola", "loramoe", "lora", "moe"],
    "--model": ["tiny", "./nowhere", "BASE", "ADAPTER", "LORA", ""],
    "--adapter": ["ADAPTER", "LORA", "BASE", "./nowhere", "FILE"],
    "--r": ["1", "4", "65536", "0", "-1", "2.5", str(10**18)],
    "--num-experts": ["1", "3", "2-4", "2,4", "2,", ",", "2-", "0", "4,4,4", "9" * 5000, "٣", " 3"],
    "--top-k": ["1", "2", "0", "9"],
    "--rounds": ["1", "3", "0", "101", str(10**30)],
}
CONVERT: dict[str, list[str]] = {
    "--to": ["graphmoe", "peft", "moe-peft", "attention-lora", "gguf"],
    "--rounds": ["1", "2", "3", "0", "-1", "1000", str(10**30)],
}
PROFILE: dict[str, list[str]] = {
    "--preset": ["tiny", "llama-3-8b", "nothing"],
    "--model": ["BASE", "ADAPTER"],
    "--adapter": ["ADAPTER"],
    "--layers": ["1", "0", "x"],
    "--method": ["mola", "lora mixlora", "moe", ""],
    "--rounds": ["0", "1 3", "-1", "x"],
    "--seq": ["4", "4 8", "", "x", "-4", "4,8", "0"],
    "--phase": ["prefill", "decode", "prefill decode", "train"],
    "--batch": ["1", "0", "-1"],
    "--dtype": ["auto", "float32", "int8"],
    "--device": ["cpu", "auto", "tpu"],
    "--threads": ["1", "0", "-1"],
    "--repetitions": ["1", "0", "-1", "x"],
    "--fold": ["auto", "always", "x"],
    "--backend": ["auto", "torch", "x"],
    "--out": ["FILE", "TMP/new"],
}
MEMORY: dict[str, list[str]] = {
    "--model": ["tiny", "./nowhere", "BASE", "ADAPTER", ""],
    "--strategy": ["ddp", "zero2 zero3", "fsdp", ""],
    "--preset": ["mixlora", "all", ""],
    "--gpus": ["1", "8", "0", "-1", "x"],
    "--tokens": ["2", "16", "1", "0", str(10**30)],
    "--loss-tokens": ["1", "2", "0", "-1", str(10**31), "x"],
    "--r": ["4", "0", str(10**18)],
    "--rounds": ["1", "0", str(10**30)],
}
DATA: dict[str, list[str]] = {"--to": ["TMP/new", "FILE", "EMPTY", "FILE/new", ".", ""]}
QUESTIONS = [
    "ASKED.JSONL",
    "ASKED.JSONL ASKED.JSONL",
    "boolq",
    "boolq:trian",
    "boolk",
    "quartz",
    "FILE",
    "EMPTY",
    "./x.jsonl",
]
MODELS = ["MODEL", "BASE", "ADAPTER", "EMPTY", "FILE", "./nowhere", "owner/none", ""]
ADAPTERS = ["ADAPTER", "LORA", "OTHER", "PEER", "BROKEN", "NAN", "BASE", "FILE", "./nowhere", "owner/none", ""]
# What a field of a recipe may be, by its kind; those named below may be other things.
OF_KIND: dict[type, list[str]] = {
    int: ["1", "2", "16", "0", "-1", "2.5", "1e3", str(10**30)],
    float: ["0.5", "1", "0", "-1", "1e-30", "nan", "inf", "x"],
    str: ["", "x", "FILE", "./nowhere"],
}
OF_FIELD: dict[str, list[str]] = {
    "model": MODELS,
    "data": QUESTIONS,
    "eval_data": QUESTIONS,
    "start_from": ADAPTERS,
    "gguf_file": ["a.gguf", "config.json", ""],
    "preset": ["mixlora", "graphmoe-mola", "lora", "nothing", ""],
    "target_modules": ["mlp", "mlp q_proj", "q_proj", "all-linear", "nothing", ""],
    "num_experts": ["1", "4", "2-4", "2,4", "0", "٣", "9" * 5000],
    "output": ["TMP/new", "TMP/new/er", "EMPTY", "BASE", "FILE", "FILE/new", ""],
}


def of_field(name: str, field: Field) -> list[str]:
    """Values of a recipe's field, so that a new one is drawn from the start."""
    return OF_FIELD.get(name) or [*(field.choices or ()), "other"] * bool(field.choices) or OF_KIND[field.kind]


FIELDS = {field.name: field_of(field) for field in dataclasses.fields(TrainingRecipe)}
TRAIN: dict[str, list[str]] = {
    "--config": ["RECIPE.YAML", "FILE", "EMPTY", "./nowhere", "ASKED.JSONL"],
    **{flag(name): of_field(name, field) for name, field in FIELDS.items() if field.kind is not bool},
}
EVAL: dict[str, list[str]] = {
    "--model": MODELS,
    "--adapter": ADAPTERS,
    "--data": QUESTIONS,
    "--tasks": ["arc_easy", "arc_easy piqa", "arc_easy,piqa", ""],
    "--split": ["test", "train", "evaluation", "x", ""],
    "--shots": ["0", "1", "-1", "x", str(10**30)],
    "--examples": ["ASKED.JSONL", "boolq:train", "FILE", ""],
    "--samples": ["1", "5", "0", "-1"],
    "--temperature": ["0.7", "0", "-1", "nan", "inf"],
    "--batch-size": ["1", "0", "-1", "x"],
    "--limit": ["1", "100", "0", "-1"],
    "--max-length": ["16", "1", "0", str(10**30)],
    "--seed": ["0", "-1", str(10**30)],
    "--gguf-file": ["a.gguf", "config.json", ""],
    "--dtype": ["auto", "float32", "int8"],
    "--device": ["cpu", "auto", "cuda", "tpu"],
    "--output": ["TMP/new", "FILE", "EMPTY", "FILE/new", "TMP/new/er", ""],
    "--records": ["TMP/new", "TMP/records", "EMPTY", ""],
}
ANALYZE: dict[str, list[str]] = {
    "--model": MODELS,
    "--adapter": ["ROUTED", "ROUTED ROUTED", *ADAPTERS],
    "--data": QUESTIONS,
    **{name: EVAL[name] for name in ("--split", "--limit", "--batch-size", "--max-length", "--gguf-file")},
    **{name: EVAL[name] for name in ("--dtype", "--device")},
    "--out": ["TMP/new", "TMP/new/er", "EMPTY", "FILE", "FILE/new", ""],
}
TRACE: dict[str, list[str]] = {
    **ANALYZE,
    "--text": ["a text", "x", "", "é $ \\ _", "x y z " * 80],
    "--router": ["model.layers.0.mlp", "mlp", ""],
    "--draws": ["1", "5", "0", "x"],
    "--seed": EVAL["--seed"],
}
SWEEP: dict[str, list[str]] = {
    "--config": ["RECIPE.YAML", "SWEPT.YAML", "FILE", "EMPTY", "./nowhere", "ASKED.JSONL"],
    "--test-data": QUESTIONS,
    "--limit": EVAL["--limit"],
    "--seeds": ["0", "0 1", "1 1", "-1", "x", " ".join(map(str, range(11)))],
    "--out": ANALYZE["--out"],
}
NUMBERS = ["1", "1 2", "2 2", "0", "-1", "x", "nan", "inf", str(10**30)]
COMPARE: dict[str, list[str]] = {"--output": ["TMP/new", "EMPTY", "FILE/new", "TMP/new/er", ""]}
FLAGS = {
    "train": [
        "--resume",
        "--help",
        "--nothing",
        "extra",
        "--",
        *(
            word
            for name, field in FIELDS.items()
            if field.kind is bool
            for word in (flag(name), f"--no-{flag(name)[2:]}")
        ),
    ],
    "eval": ["--allow-other-base", "--load-in-4bit", "--load-in-8bit", "--help", "--nothing", "extra", "--"],
    "analyze balance": ["--allow-other-base", "--no-plot", "--plot", "--help", "--nothing", "extra", "--"],
    "analyze trace": ["--allow-other-base", "--no-plot", "--plot", "--help", "--nothing", "extra", "--"],
    **{
        f"analyze {kind}": ["--no-plot", "--plot", "--help", "--nothing", "extra", "--"]
        for kind in ("sensitivity", "parameters", "activated", "latency", "composition")
    },
    "compare": ["--help", "--nothing", "--"],
    "export": ["--allow-other-base", "--help", "--nothing", "extra", "--"],
    "data": ["--to", "--unpack", "--nothing", "--help", "extra", "--"],
    "memory": ["--json", "--checkpointing", "--no-checkpointing", "--help", "--nothing", "--", "extra"],
    "params": ["--json", "--dora", "--no-dora", "--help", "--nothing", "--", "extra"],
    "convert": ["--overwrite", "--nothing", "--help", "extra"],
    "profile": ["--no-plot", "--plot", "--nothing", "--help", "extra", "--"],
}
VALUES = {
    "params": PARAMS,
    "convert": CONVERT,
    "profile": PROFILE,
    "memory": MEMORY,
    "data": DATA,
    "train": TRAIN,
    "eval": EVAL,
    "compare": COMPARE,
    "export": {
        "--model": MODELS,
        "--adapter": ["ROUTED", *ADAPTERS],
        "--output": ["TMP/new", "TMP/new/er", "EMPTY", "BASE", "FILE", "FILE/new", ""],
        **{name: EVAL[name] for name in ("--gguf-file", "--dtype")},
    },
    "analyze balance": ANALYZE,
    "analyze sensitivity": {**SWEEP, "--rounds": NUMBERS, "--scales": ["0.25", *NUMBERS]},
    "analyze parameters": {**SWEEP, "--ranks": NUMBERS},
    "analyze latency": {"--out": ANALYZE["--out"]},
    "analyze composition": {"--out": ANALYZE["--out"], "--tokens": ["4", "8", "0", "x"]},
    "analyze activated": {**SWEEP, "--top-k": NUMBERS},
    "analyze trace": TRACE,
}
PLACES = ["ADAPTER", "PEER", "LORA", "BASE", "BROKEN", "NAN", "EMPTY", "FILE", "./nowhere", "TMP/new", "TMP/new/er", ""]
EVALUATIONS = [*["ONE.JSON", "TWO.JSON"] * 3, "THREE.JSON", "ASKED.JSONL", "FILE", "EMPTY", "./nowhere", ""]
WILD = [
    "",
    " ",
    "x",
    "0",
    "-1",
    "1e9",
    "nan",
    "[red]",
    "[/]",
    "é",
    "\0",
    "--",
    "-",
    "=",
    "٣",
    "9" * 5000,
    "a b",
    "'",
    "%s",
    "{}",
]


@st.composite
def lines(draw: Any, command: str) -> list[str]:
    """A command's arguments; names of places in capitals stand for paths."""
    words: list[str] = []
    if command == "convert":
        words += [draw(st.sampled_from(PLACES)) for _ in range(draw(st.sampled_from([2, 2, 2, 2, 1, 3])))]
    elif command == "data":
        words += [draw(st.sampled_from(["fetch"] * 4 + ["list", "get"]))]
        words += draw(st.lists(st.sampled_from(["quartz", "smollm2", "boolq", "quarz", *WILD]), max_size=2))
    elif command == "params" and draw(st.integers(0, 3)):  # most of what is drawn would else name nothing to count
        words += draw(st.sampled_from([["--preset", "mixlora"], ["--method", "mola"], ["--adapter", "ADAPTER"]]))
        words += ["--model", "tiny"]
    elif command in ("train", "eval") and draw(st.integers(0, 5)):
        words += ["--model", draw(st.sampled_from(["MODEL", "MODEL", *MODELS])), "--data", "ASKED.JSONL"]
        words += ["--output", "TMP/new", "--use-cpu"] if command == "train" else ["--device", "cpu"]
    elif command in ("analyze latency", "analyze composition"):
        words += draw(st.lists(st.sampled_from(["PROFILE.JSON", *EVALUATIONS]), min_size=1, max_size=2))
    elif command.startswith("analyze") and "--config" in VALUES[command]:
        words += draw(st.sampled_from([["--config", "SWEPT.YAML", "--test-data", "ASKED.JSONL", "--no-plot"], []]))
        words += ["--ranks", "1"] if command == "analyze parameters" else []
    elif command.startswith("analyze") and draw(st.integers(0, 5)):
        words += ["--model", "MODEL", "--adapter", "ROUTED", "--data", "ASKED.JSONL", "--device", "cpu"]
        words += ["--no-plot"] * draw(st.integers(0, 4))
    elif command == "export" and draw(st.integers(0, 5)):
        words += ["--model", "MODEL", "--adapter", "ROUTED", "--output", "TMP/new"]
    elif command == "compare":
        words += draw(st.lists(st.sampled_from(EVALUATIONS), min_size=1, max_size=3))
    options = VALUES[command]
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=3)):
        value = draw(st.sampled_from(options[name] if draw(st.integers(0, 4)) else WILD))
        words += draw(st.sampled_from([[name, *value.split(" ")], [name, value], [f"{name}={value}"], [name]]))
    flags = draw(st.lists(st.sampled_from(FLAGS[command]), max_size=1))
    return [*words, *flags]
