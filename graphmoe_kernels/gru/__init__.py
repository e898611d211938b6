"""The low-rank GRU step that joins two rounds of self-rethinking."""

from graphmoe_kernels.gru.api import CANDIDATE_ACTIVATIONS as CANDIDATE_ACTIVATIONS
from graphmoe_kernels.gru.api import check_candidate_activation as check_candidate_activation
from graphmoe_kernels.gru.api import gru_step as gru_step
