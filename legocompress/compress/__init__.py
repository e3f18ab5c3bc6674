"""From a dense network to a converted one: plan, budget, factorisation, conversion."""

from legocompress.compress.budget import allocate
from legocompress.compress.convert import convert_
from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.compress.planning import plan

__all__ = ["LayerPlan", "Plan", "allocate", "convert_", "plan"]
