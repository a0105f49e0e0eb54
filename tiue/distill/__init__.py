"""How a student is trained: one loop that drives any method, and the method of the paper.

cli, config                  the command line `python -m tiue`, its settings, presets/
loop                         the training loop: resume, signals, log, checkpoints, averaging, sample grids, DDP, FSDP
method                       what the loop asks of a method (Protocol) and gives to one (Run, Trained)
vsd                          the paper's method; it uses scores (teacher, fake score), clip (optional loss), optimizers
batches                      captions to text embeddings; it uses prompt_store and embeddings, which are on the disk
draws                        batches, and random numbers that belong to samples
runs, average, sharding      files of a run; the average that is saved; states of sharded tensors
signals, samples, report     stopping; the grid of pictures; report.md
estimate                     memory of a run, from shapes alone
"""
