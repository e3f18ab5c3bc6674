"""A network in its fastest form for one machine: frozen, fused, a route chosen for every layer."""

from legocompress.deploy.network import Deployment, deploy_, undeploy_

__all__ = ["Deployment", "deploy_", "undeploy_"]
