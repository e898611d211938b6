"""What a forward leaves behind about its routing, and the losses and counts that are made of it.

Layers hand their routers' logits to the `RoutingContext` of their model (`record`); hooks on the model open and close
each forward and add the router loss to its loss (`router_loss_hooks`, `loss`, over all processes `global_routing`);
`collect_routing` counts what the experts got. `callback` and `trainer_view` are for Trainer and TRL.
"""
