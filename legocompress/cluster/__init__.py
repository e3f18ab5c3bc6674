"""Fragments of a layer's filters -> Lego filters, the index that picks them, their coefficients."""

from legocompress.cluster.clustering import cluster, clusterings

__all__ = ["cluster", "clusterings"]
