"""Full-size pipelines with random weights, and how fast they run: for measuring, not for pictures."""
