"""What the benchmarks share: models with their evaluations, plain codings, curves and reports."""
