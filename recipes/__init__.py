"""Shipped fine-tuning recipes, one YAML file each."""
