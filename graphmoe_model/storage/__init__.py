"""How the base model's weights are stored, and who manages them: quantised, offloaded, sharded, or plain."""
