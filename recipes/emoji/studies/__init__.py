"""Studies on the emoji teacher: `drift`, what the KL term does; `sharing`, what a shared up block costs."""
