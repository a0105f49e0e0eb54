"""Studies on the default model: `drift`, the effect of the KL term; `sharing`, the cost of a shared up block."""
