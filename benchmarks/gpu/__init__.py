"""`python -m benchmarks.gpu`: what only a GPU can show, in parts, each with results of its own.

    network     one pass of the UNet beside the student's encoder and decoder     -> halves
    launches    whether the GPU waits for Python: batch 1 beside batch 64         -> halves, updates
    training    updates of a distillation                                         -> updates
    tests       the tests with the mark gpu                                       -> marked
    cuda        pictures: PyTorch, diffusers, ONNX Runtime on CUDA                -> pictures
    tensorrt    pictures: ONNX Runtime on TensorRT                                -> pictures

Modules behind them:
    __main__ -> supervised      the command line: parts in order, each as a process with a time limit
    one_part -> results         one part: its cases in order, written to the disk after each
    parts                       the list of parts
    conditions, timing          the machine and its packages; times on a GPU
"""
