"""Command lines of ``graphmoe``: options and values that a person could mean, and any others."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

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
    "--rounds": ["0", "1 3", "-1", "x"],
    "--seq": ["4", "4 8", "", "x", "-4", "4,8", "0"],
    "--phase": ["prefill", "decode", "prefill decode", "train"],
    "--batch": ["1", "0", "-1"],
    "--dtype": ["auto", "float32", "int8"],
    "--device": ["cpu", "auto", "tpu"],
    "--threads": ["1", "0", "-1"],
    "--out": ["FILE", "TMP/new"],
}
MEMORY: dict[str, list[str]] = {
    "--model": ["tiny", "./nowhere", "BASE", "ADAPTER", ""],
    "--strategy": ["ddp", "zero2 zero3", "fsdp", ""],
    "--preset": ["mixlora", "all", ""],
    "--gpus": ["1", "8", "0", "-1", "x"],
    "--tokens": ["2", "16", "1", "0", str(10**30)],
    "--r": ["4", "0", str(10**18)],
    "--rounds": ["1", "0", str(10**30)],
}
DATA: dict[str, list[str]] = {"--to": ["TMP/new", "FILE", "EMPTY", "FILE/new", ".", ""]}
FLAGS = {
    "data": ["--to", "--nothing", "--help", "extra", "--"],
    "memory": ["--json", "--no-checkpointing", "--help", "--nothing", "--", "extra"],
    "params": ["--json", "--dora", "--no-dora", "--help", "--nothing", "--", "extra"],
    "convert": ["--overwrite", "--nothing", "--help", "extra"],
    "profile": ["--no-plot", "--plot", "--nothing", "--help", "extra", "--"],
}
VALUES = {"params": PARAMS, "convert": CONVERT, "profile": PROFILE, "memory": MEMORY, "data": DATA}
PLACES = ["ADAPTER", "PEER", "LORA", "BASE", "BROKEN", "NAN", "EMPTY", "FILE", "./nowhere", "TMP/new", "TMP/new/er", ""]
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
    options = VALUES[command]
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=3)):
        value = draw(st.sampled_from(options[name] if draw(st.integers(0, 4)) else WILD))
        words += draw(st.sampled_from([[name, *value.split(" ")], [name, value], [f"{name}={value}"], [name]]))
    flags = draw(st.lists(st.sampled_from(FLAGS[command]), max_size=1))
    return [*words, *flags]
