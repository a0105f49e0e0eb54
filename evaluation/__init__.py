"""How good pictures are: of any bundle, pipeline or student.

    metrics    distances between two sets of features, each with a bootstrap interval
    figures    all of a report's figures
    features   networks that turn pictures into features
    encoder    one of them, which is trained here on small drawings
    inception  another, which was trained elsewhere (npm package nsfwjs)
    painters   what is judged
    reference  what it is compared with
    cli        `python -m evaluation`
    guidance   `python -m evaluation.guidance`, about a teacher

Benchmarks say what pictures cost; this package says what they are worth. It imports neither recipes nor benchmarks.
"""
