"""Training a student: one loop for any method, and the method of the paper.

cli, config                  the command line `python -m tiue`, its settings, presets/
loop                         the training loop: resume, signals, log, checkpoints, averaging, sample grids, DDP, FSDP
method                       the interface of a method (the Protocol Method), and its tools (Run, Trained)
vsd                          the paper's method; it uses scores (teacher, fake score), clip (optional loss), optimizers
batches                      captions to text embeddings; it uses prompt_store and embeddings, which use the disk
draws                        batches, and the random numbers of their samples
runs, average, sharding      files of a run; the average that is saved; states of sharded tensors
signals, samples, report     stopping; the grid of pictures; report.md
estimate                     memory of a run, from shapes alone
"""
