"""Training a student: one loop for any method, and the method of the paper.

cli, config                  the command line `python -m tiue`, its settings, presets/
loop                         the training loop: resume, signals, log, checkpoints, averaging, sample grids, DDP, FSDP
method                       the interface between the loop and a method (Method), and its tools (Run, Trained)
vsd                          the paper's method: VSD (variational score distillation), KL on the predicted noise
scores, clip, optimizers     for vsd: the teacher and the fake score; the optional CLIP loss; the optimizers
batches                      the captions of a run and their text embeddings; prompt_store, embeddings: on the disk
draws                        the batch of an update, and the random numbers of its samples
runs, average, sharding      files of a run; the average that is saved; states of sharded tensors
signals, samples, report     stopping; the grid of pictures; report.md
estimate                     memory of a run, from shapes alone
"""
