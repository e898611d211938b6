"""How the base model's weights are stored, and who manages them: quantised, offloaded, sharded, or plain.

`linear_kinds` has the kinds of linears in one table, `dequantise` what layers ask of one. `weight_management` tells who
holds a layer's weights and what may be kept of them; `offloading` and `offloaded_loading` are for accelerate's hooks.
"""
