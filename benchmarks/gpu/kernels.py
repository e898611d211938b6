"""Every kernel on its own: checked, then launched again and again with the arguments that the operator gave it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.checks import Verdict, check_operator
from benchmarks.devices import Call, Device
from benchmarks.operator_timing import COLD_FACTOR, copies_for
from benchmarks.operators import Operands, Operator, forward_only, gradients, with_order
from benchmarks.roofline import KERNELS, Limits, work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS, Launch, device_class, recorded

# Of the PyTorch backend, whose intermediates are large.
TORCH_COPIES = 2


def time_kernels(
    operator: Operator,
    sizes: Sizes,
    device: Device,
    dtype: torch.dtype,
    limits: Limits,
    seconds: float,
) -> tuple[Verdict, list[dict[str, Any]]]:
    """The operator's verdict, and a row for each of its kernels; no rows where the check failed.

    With more than `SKINNY_TOKENS` tokens the expert kernels are timed with and without the order of tokens. Beside the
    kernels stand the operator's whole forward and that of the PyTorch backend, under "operator".
    """
    operands = operator.operands(sizes, operator.later, dtype, device.torch)
    checked = with_order(operator, operands)
    found = check_operator(operator, checked, dtype)
    if found.fault is not None:
        return found, []

    copies = [{name: t.clone() for name, t in operands.items()} for _ in range(copies_for(operands, device.l2_bytes))]
    cold = len(copies) * sum(t.numel() * t.element_size() for t in operands.values()) >= COLD_FACTOR * device.l2_bytes
    ordered = [with_order(operator, each) for each in copies]
    launches: dict[tuple[str, bool], list[Launch]] = {}
    variants = [(True, ordered)]
    if operator.name == "experts" and sizes.tokens > SKINNY_TOKENS:
        variants.append((False, copies))
    for in_order, sets in variants:
        for operand_set in sets:
            for made in launches_of(operator, operand_set):
                launches.setdefault((made.name, in_order), []).append(made)
    calls = {key: device.capture(partial(all_again, made)) for key, made in launches.items()}
    whole = {
        "triton": device.capture(partial(_forward_all, operator, ordered, "triton")),
        **_torch_call(operator, copies[:TORCH_COPIES], device),
        **_fold_product(operator, copies, device),
    }
    names: dict[str, Call] = {f"{name}|{in_order}": call for (name, in_order), call in calls.items()}
    timed = device.in_turns(names | {f"operator {name}": call for name, call in whole.items()}, seconds)
    rows = []
    for name, in_order in launches:
        times = len(copies)
        row = _row(operator, sizes, name, in_order, limits, device)
        rows.append(row | {"seconds": _per(timed[f"{name}|{in_order}"].summary(), times), "cold": cold})
    for name in whole:
        times = min(TORCH_COPIES, len(copies)) if name == "torch" else len(copies)
        rows.append(
            _base_row(operator, sizes)
            | {"kernel": "operator forward", "backend": name}
            | {"seconds": _per(timed[f"operator {name}"].summary(), times), "cold": cold}
        )
    return found, rows


def launches_of(operator: Operator, operands: Operands) -> list[Launch]:
    outputs = {name: t for name, t in operator.run(operands, "triton").items() if t.is_floating_point()}
    upstream = {name: torch.randn_like(t) for name, t in outputs.items()}
    with recorded() as found:
        gradients(operator, operands, "triton", upstream)
    return found


def all_again(launches: list[Launch]) -> None:
    for each in launches:
        each.again()


def _forward_all(operator: Operator, sets: list[Operands], backend: str) -> list[Any]:
    return [forward_only(operator, operands, backend) for operands in sets]


def _torch_call(operator: Operator, sets: list[Operands], device: Device) -> dict[str, Call]:
    """The PyTorch backend's forward, unless it does not fit: then there is nothing beside the kernels.

    That of the experts asks the device how many tokens chose each of them, which no graph can hold.
    """
    call = partial(_forward_all, operator, sets, "torch")
    try:
        call()
        return {"torch": call if operator.name == "experts" else device.capture(call)}
    except Exception:  # the kernels' own rows must not be lost for it; a lost device raises in the last line again
        device.release()
        device.synchronize()
        return {}


def _fold_product(operator: Operator, sets: list[Operands], device: Device) -> dict[str, Call]:
    """H M^T of a later round by cuBLAS, which the expert kernels compute themselves: what it costs apart."""
    if operator.name != "experts" or not operator.later:
        return {}
    folds = [torch.cat([each["fold_gate"], each["fold_up"]]) for each in sets]  # [2F, G'] each

    def products() -> list[torch.Tensor]:
        return [torch.mm(each["state"], fold.T) for each, fold in zip(sets, folds, strict=True)]

    return {"cuBLAS, H M^T alone": device.capture(products)}


def _base_row(operator: Operator, sizes: Sizes) -> dict[str, Any]:
    return {
        "operator": operator.name,
        "round": "later" if operator.later else "first",
        "tokens": sizes.tokens,
        "experts": sizes.experts,
        "dtype": sizes.dtype,
    }


def _row(
    operator: Operator, sizes: Sizes, kernel: str, ordered: bool, limits: Limits, device: Device
) -> dict[str, Any]:
    row = _base_row(operator, sizes) | {"kernel": kernel, "ordered": ordered}
    if kernel in KERNELS:
        needed = work(kernel, sizes, operator.later, ordered, limits.multiprocessors, device_class(device.torch))
        row |= {"work": needed._asdict(), "limits": limits.times(needed)}
    return row


def _per(summary: dict[str, Any], times: int) -> dict[str, Any]:
    """A graph's summary as that of one of the ``times`` calls in it."""
    return {
        "median": summary["median"] / times,
        "quartiles": [q / times for q in summary["quartiles"]],
        "best": summary["best"] / times,
        "turns": summary["turns"],
        "calls a turn": times,
    }
