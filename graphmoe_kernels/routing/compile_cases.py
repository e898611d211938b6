"""The variants of the routing kernels that are compiled ahead of time, at the sizes of Llama 3 8B and at the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from graphmoe_kernels.aot.case import CompileCase
from graphmoe_kernels.launching import SMALLEST_TILE, power_of_two
from graphmoe_kernels.routing.launch import MAX_EXPERTS, STATISTICS, blocks
from graphmoe_kernels.routing.order import ORDER_WINDOW

DTYPES = {"bf16": "half", "fp16": "half", "fp32": "float"}
# Experts, and experts a token: one, a prime, the most, and two that fill a block.
LIMITS = ((1, 1), (37, 3), (64, 6), (128, 8), (MAX_EXPERTS, 8), (MAX_EXPERTS, MAX_EXPERTS))

Configs = Callable[[str, str, str], dict]


def _case(
    name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, object], config: dict, ints: tuple
) -> CompileCase:
    constexprs |= {key: value for key, value in config.items() if key.startswith("BLOCK_")}
    return CompileCase(
        f"routing {name}", kernel, signature, constexprs, config["num_warps"], config["num_stages"], False, ints
    )


def _pointers(present: dict[str, str | None]) -> tuple[dict[str, str], dict[str, object]]:
    """Signature and constexprs of pointers: an absent one is the constant None."""
    return {k: v for k, v in present.items() if v}, {k: None for k, v in present.items() if not v}


def _forward(
    configs: Configs, size: str, x: str | None, router: str | None, offset: str | None, n: int, k: int, statistics: str
) -> CompileCase:
    from graphmoe_kernels.routing.triton_kernels import route_forward

    main = x or offset or ""
    asked = statistics != "none"
    signature, constexprs = _pointers(
        {
            "x_ptr": x and f"*{x}",
            "router_ptr": router and f"*{router}",
            "offset_ptr": offset and f"*{offset}",
            "mask_ptr": "*u8" if asked else None,
            "logits_ptr": "*fp32",
            "weights_ptr": "*fp32",
            "experts_ptr": "*i32",
            "counts_ptr": "*fp32",
            "mass_ptr": "*fp32",
            "tickets_ptr": "*i32",
        }
    )
    integers = ("num_tokens", "hidden", "x_stride", "router_stride", "offset_stride")
    signature |= dict.fromkeys(integers, "i32")
    constexprs |= {
        "HAS_X": x is not None,
        "HAS_OFFSET": offset is not None,
        "HAS_MASK": asked,
        "STORE_LOGITS": x is not None or main != "fp32",
        "NORMALIZE": True,
        "STATISTICS": STATISTICS[statistics if asked else None],
        "NUM_EXPERTS": n,
        "TOP_K": k,
        "TICKET_TOKENS": SMALLEST_TILE,
        "BLOCK_S": power_of_two(k),
    }
    name = f"forward {size} x={x} router={router} offset={offset} n={n} k={k} statistics={statistics}"
    config = blocks(configs("forward", size, DTYPES[main]), n)
    return _case(name, route_forward, signature, constexprs, config, ("hidden", "x_stride", "router_stride"))


def _backward(
    configs: Configs, size: str, logits: str, n: int, k: int, normalize: bool, statistics: str
) -> CompileCase:
    from graphmoe_kernels.routing.triton_kernels import route_backward

    asked = statistics != "none"
    signature, constexprs = _pointers(
        {
            "d_logits_ptr": "*fp32",
            "d_weights_ptr": "*fp32",
            "d_mass_ptr": "*fp32" if asked else None,
            "logits_ptr": f"*{logits}",
            "experts_ptr": "*i32",
            "mask_ptr": "*u8" if asked else None,
            "total_ptr": "*fp32",
        }
    )
    signature |= {"num_tokens": "i32", "logits_stride": "i32"}
    constexprs |= {
        "HAS_D_LOGITS": True,
        "HAS_D_WEIGHTS": True,
        "HAS_D_MASS": asked,
        "HAS_MASK": asked,
        "NORMALIZE": normalize,
        "STATISTICS": STATISTICS[statistics if asked else None],
        "NUM_EXPERTS": n,
        "TOP_K": k,
    }
    name = f"backward {size} logits={logits} n={n} k={k} normalize={normalize} statistics={statistics}"
    config = blocks(configs("backward", size, DTYPES[logits]), n)
    return _case(name, route_backward, signature, constexprs, config, ())


def _order(configs: Configs, size: str, k: int) -> CompileCase:
    from graphmoe_kernels.routing.triton_order import order_tokens

    signature = {"experts_ptr": "*i32", "order_ptr": "*i32", "num_tokens": "i32"}
    constexprs: dict[str, object] = {"TOP_K": k, "WINDOW": ORDER_WINDOW, "MAX_EXPERTS": MAX_EXPERTS}
    return _case(f"order {size} k={k}", order_tokens, signature, constexprs, configs("order", size, "float"), ())


def compile_cases(configs: Configs) -> Iterator[CompileCase]:
    """Every kernel with every configuration; ``configs(kernel, size class, dtype class)`` gives the configuration."""
    for size in ("skinny", "wide"):
        for dtype in DTYPES:
            for router in sorted({dtype, "fp32"}):
                yield _forward(configs, size, dtype, router, None, 8, 2, "none")
                yield _forward(configs, size, dtype, router, "fp32", 8, 2, "topk")
            yield _forward(configs, size, None, None, dtype, 8, 2, "full")
            yield _backward(configs, size, dtype, 8, 2, True, "topk")
        for n, k in LIMITS:
            for dtype in ("bf16", "fp32"):
                yield _forward(configs, size, dtype, "fp32", "fp32", n, k, "topk")
            yield _backward(configs, size, "fp32", n, k, False, "full")
        for k in (1, 2, 8):
            yield _order(configs, size, k)
