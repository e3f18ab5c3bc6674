"""The fastest form of a network on one machine.

`deploy_` traces a network, folds its norms, fuses its activations and residual sums, and chooses a
backend for each layer: by timing them (`autotune`), or by choices that were timed before.
"""

from legocompress.deploy.deployment import deploy_, deployed_graph, undeploy_
from legocompress.state.deployment import Deployment

__all__ = ["Deployment", "deploy_", "deployed_graph", "undeploy_"]
