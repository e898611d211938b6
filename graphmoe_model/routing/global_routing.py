"""One load-balance loss for all processes: Eq. 8 over the tokens of all of them, with one collective per forward.

This is ``router_aux_loss_scope="global"``. Of each router and round, process r has the tokens per expert C_r, the
probability sums M_r and the number of tokens N_r; with C, M and N their sums over W processes, Eq. 8 of the global
batch is L = n sum_i (C_i / sum_j C_j) (M_i / N). These sums have no gradient of their own, so that the backward pass
needs no collective:

- Data parallelism (DDP, FSDP, DeepSpeed) differentiates the mean over processes of their losses, J = 1/W sum_r loss_r,
  where process r differentiates its own loss_r with respect to what it computed itself, M_r.
- L is linear in M: dL/dM_r = n C / (sum_j C_j N) is the same constant on all processes, whatever N_r is.
- So process r takes loss_r = s L with M = [sum of all M_r] + W (M_r - [M_r]), brackets without gradient. Its value
  is s L, its derivative W s dL/dM_r, and J's gradient is 1/W sum_r W s dL/dM_r dM_r/dw = s dL/dw: that of one process
  with the same global batch.
- s is the mean over processes of the router loss's weight (1; under Trainer the share of ``num_items_in_batch``, which
  differs between processes with ragged batches, and whose sum over micro-batches and processes is W or, where Trainer
  multiplies losses by W, 1).

Which process ran which layer may differ (layers that are dropped, or that see only some inputs), so that the places in
the collective follow from the layers and their configurations, never from what ran here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from graphmoe_model.routing.record import ForwardRouting, RoutingRecord
from graphmoe_model.routing.statistics import GlobalRouting, RoutingStatistics

_JOIN = (
    "router_aux_loss_scope='global' does not work inside of DistributedDataParallel.join() (accelerate's "
    "join_uneven_inputs): a process that has run out of batches takes part in DDP's collectives alone, and the others "
    "would wait for its routing. Give every process the same number of batches, pass throw_on_early_termination=True, "
    "or set router_aux_loss_scope='local'"
)


class _Place(NamedTuple):
    """A router's place in the collective: 2 T n + 2 numbers.

    Attributes:
        shape: [T, n].
        coefficient: the weight of its loss in the model's.
        own: what it did on this process; None where it did not run.
    """

    shape: tuple[int, int]
    coefficient: float
    own: RoutingStatistics | None


def sum_over_processes(forward: ForwardRouting, layers: Sequence[Any], share: Tensor | float = 1.0) -> None:
    """Set ``forward.all_processes`` where its loss is one of all processes, by one collective of the default group.

    Every process must call this for the same forwards. It does nothing for a forward without gradients or outside of
    training, for ``router_aux_loss_scope="local"`` and where there is one process only.

    Args:
        forward: has ended, with its records.
        layers: all routed layers that it could have run, in the same order on all processes.
        share: weight of its router loss in its ``outputs.loss``.

    Raises:
        ValueError: the active adapters of the layers differ in their scope.
        RuntimeError: it runs inside of ``DistributedDataParallel.join()``.
    """
    if not forward.differentiable or not (distributed.is_available() and distributed.is_initialized()):
        return
    processes = distributed.get_world_size()
    layers = layers if processes == 1 else _global_layers(layers)
    if processes == 1 or not layers:
        return
    if not torch.compiler.is_compiling():
        _check_join()
    weight = next(layers[0].lora_graphmoe[layers[0].active_name()].parameters())
    device = forward.records[0].logits[0].device if forward.records else weight.device
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32  # as the operators' sums
    places = _places(layers, forward.records, device, dtype)
    if isinstance(share, float):
        share = torch.full((), share, device=device)
    with torch.no_grad():
        sums = _packed(places, share.to(device, dtype))
        distributed.all_reduce(sums)
    forward.all_processes = _unpacked(sums, places, processes)


def _global_layers(layers: Sequence[Any]) -> list[Any]:
    """Select the layers whose routers enter a loss of all processes, whether or not they ran here."""
    found, scopes = [], {}
    for layer in layers:
        config = layer.active_config() if layer.training else None
        if config is not None and config.router_aux_loss_coef > 0:
            scopes[config.router_aux_loss_scope] = layer.active_name()
            found.append(layer)
    if len(scopes) > 1:
        raise ValueError(
            f"the active adapters {scopes['local']!r} (router_aux_loss_scope='local') and {scopes['global']!r} "
            "('global') differ in whose tokens their load-balance loss counts, and a forward has one such loss; give "
            "both the same router_aux_loss_scope, or activate one"
        )
    return found if "global" in scopes else []


def _check_join() -> None:
    module: Any = DistributedDataParallel._get_active_ddp_module()
    join = getattr(module, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise RuntimeError(_JOIN)


def _places(
    layers: Sequence[Any], records: list[RoutingRecord], device: torch.device, dtype: torch.dtype
) -> list[_Place]:
    """Make a place for every router, and further ones where a layer runs more than once in a forward."""
    ran: dict[tuple[int, str], list[RoutingRecord | None]] = {}
    for record in records:
        ran.setdefault((id(record.layer), record.router), []).append(record)
    places = []
    for layer in layers:
        coefficient = layer.active_config().router_aux_loss_coef
        for router, shape in layer.router_shapes().items():
            here = ran.get((id(layer), router)) or [None]
            places += [_Place(shape, coefficient, _statistics(record, device, dtype)) for record in here]
    return places


def _statistics(record: RoutingRecord | None, device: torch.device, dtype: torch.dtype) -> RoutingStatistics | None:
    return None if record is None else RoutingStatistics(*(own.to(device, dtype) for own in record.statistics()))


def _packed(places: list[_Place], share: Tensor) -> Tensor:
    """Make a vector of the share and, for every place, its statistics and 1, or zeros where nothing ran here."""
    parts = [share.reshape(1)]
    for (T, n), _, own in places:
        if own is None:
            parts.append(share.new_zeros(2 * T * n + 2))
        else:
            parts += [*(each.flatten() for each in own), share.new_ones(1)]
    return torch.cat(parts)


def _unpacked(sums: Tensor, places: list[_Place], processes: int) -> GlobalRouting:
    """Take apart what `_packed` put together, with the way of the gradient to what this process did."""
    sizes = [size for (T, n), _, _ in places for size in (T * n, T * n, 1, 1)]
    share, *parts = sums.split([1, *sizes])
    statistics = []
    for i, (shape, _, own) in enumerate(places):
        tokens_per_expert, probability_sums, num_tokens, _ = parts[4 * i : 4 * i + 4]
        probability_sums = probability_sums.view(shape)
        if own is not None:
            here = own.probability_sums
            probability_sums = probability_sums + processes * (here - here.detach())
        statistics.append(RoutingStatistics(tokens_per_expert.view(shape), probability_sums, num_tokens.squeeze(0)))
    coefficients = [place.coefficient for place in places]
    return GlobalRouting(statistics, coefficients, torch.cat(parts[3::4]), share.squeeze(0) / processes)
