"""How a student is trained: one loop, and the method of the paper.

cli, config        settings and the command line, `python -m tiue`
loop               the training loop: resume, signals, log, checkpoints, averaging, sample grids, DDP and FSDP
scores, draws      teacher and fake score; random numbers that belong to samples
embeddings, prompt_store   text embeddings and captions on the disk
clip, optimizers, sharding, estimate, runs, report
"""
