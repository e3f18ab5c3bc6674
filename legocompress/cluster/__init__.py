"""Turn fragments of a layer's filters into Lego filters, an index and coefficients."""

from legocompress.cluster.clustering import cluster, clusterings

__all__ = ["cluster", "clusterings"]
