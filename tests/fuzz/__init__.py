"""A fuzzer of everything that TiUE reads from files that other people wrote.

cases       what a case is, and the hostile values and bytes that all kinds of files have in common
bundles, graphs, tokenizers, students, captions, pictures    how files of each kind are damaged
targets     what a worker does with a damaged file, and what may come out
pool        workers: processes with a limit of memory and of time, started again after a crash
driver      draws cases from a seed, runs them, counts what came out

`tests/test_fuzz.py` runs a few hundred cases of every kind, `python tests/fuzzer.py --cases 20000` as many as are asked
for. The drawing of cases never looks at the code under test, so a seed and a number give the same case again.
"""
