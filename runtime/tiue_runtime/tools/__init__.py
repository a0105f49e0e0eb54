"""Command-line tools: `tiue-runtime generate`, `info`, `verify`, `doctor` and `bench`.

cli      the command line
doctor   what is installed, and whether it works
bench    seconds per picture, graph by graph
"""
