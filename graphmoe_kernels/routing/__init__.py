"""Top-k softmax routing: which experts a token goes to, how strongly, and how evenly experts are used."""

from graphmoe_kernels.routing.api import route_tokens as route_tokens
from graphmoe_kernels.routing.api import topk_softmax_routing as topk_softmax_routing
from graphmoe_kernels.routing.operands import Routing as Routing
