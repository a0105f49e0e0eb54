"""How good pictures are: of any bundle, pipeline or student.

    metrics    distances between two sets of features, each with a bootstrap interval
    inception  features by an Inception v3 that was trained elsewhere (npm package nsfwjs)

Benchmarks say what pictures cost; this package says what they are worth. It imports neither recipes nor benchmarks.
"""
