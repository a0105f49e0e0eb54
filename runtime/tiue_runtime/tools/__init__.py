"""Command-line tools: `tiue-runtime generate`, `info`, `verify`, `doctor` and `bench`.

cli      the command line
doctor   the installed parts, and whether they work
bench    seconds per picture, graph by graph
"""
