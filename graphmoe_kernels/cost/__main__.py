"""``python -m graphmoe_kernels.cost``: see `graphmoe_kernels.cost`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from graphmoe_kernels.cost import report
from graphmoe_kernels.cost.counter import count_layer
from graphmoe_kernels.cost.sizes import DTYPES, ROUTERS, Sizes


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m graphmoe_kernels.cost",
        description="Multiply-adds and bytes of a GraphMoE layer in its forms (dense, peers, literal, folded), by "
        "arithmetic, beside what PyTorch's FLOP counter reads off the code at a smaller size.",
    )
    p.add_argument("--hidden", type=int, required=True, help="hidden size D, e.g. 4096")
    p.add_argument("--intermediate", type=int, required=True, help="intermediate size F, e.g. 14336")
    p.add_argument("--tokens", type=int, default=8192, help="tokens of one prefill call (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="rounds T (%(default)s)")
    p.add_argument("--experts", type=int, default=8, help="(%(default)s)")
    p.add_argument("--top-k", type=int, default=2, help="experts per token (%(default)s)")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank r (%(default)s)")
    p.add_argument("--gru-scale", type=float, default=0.1, help="GRU width over hidden size (%(default)s)")
    p.add_argument(
        "--routers",
        choices=ROUTERS,
        default="layer",
        help="layer: one router chooses whole experts (MixLoRA); linear: every linear mixes its own (LoRAMoE with "
        "--top-k as large as --experts, MoLA); none: one expert (LoRA) (%(default)s)",
    )
    p.add_argument("--dora", action="store_true", help="experts with DoRA's magnitudes")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations (%(default)s)")
    p.add_argument("--terms", action="store_true", help="also every term of every form")
    return p


def gru_width(scale: float, hidden: int) -> int:
    """Compute G, as a layer of this hidden size has it; ``ValueError`` if that is no GRU."""
    if not 0 < scale <= 1:
        raise ValueError(f"gru-scale must lie in (0, 1], got {scale}")
    width = int(scale * hidden)
    if hidden > 0 and width < 1:
        raise ValueError(f"gru-scale {scale} of hidden size {hidden} is a GRU of width 0; choose a larger scale")
    return max(width, 1)


def smaller(sizes: Sizes) -> Sizes:
    """Choose sizes of like proportions at which the code runs in a moment."""
    hidden = min(sizes.hidden, 256)
    return replace(
        sizes,
        hidden=hidden,
        intermediate=max(1, min(sizes.intermediate * hidden // sizes.hidden, 2048)),
        gru_width=max(1, sizes.gru_width * hidden // sizes.hidden),
        tokens=min(sizes.tokens, 64),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the cost model of the sizes on the command line."""
    p = parser()
    given = vars(p.parse_args(arguments))
    scale, all_terms = given.pop("gru_scale"), given.pop("terms")
    try:
        sizes = Sizes(gru_width=gru_width(scale, given["hidden"]), **given)
    except ValueError as error:
        p.error(str(error))
    print(report.report(sizes))
    if all_terms:
        print("\n" + report.terms(sizes))
    small = smaller(sizes)
    print("\n" + report.readings(small, count_layer(small)))


if __name__ == "__main__":
    main()
