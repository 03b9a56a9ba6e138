"""Weights to levels: statistics, steps, transform, quantizers, order, frames."""
