"""The Lego unit: its sizes, math, costs and storage, and the layer that holds it."""
