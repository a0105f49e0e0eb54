"""This computer: its hardware and its free memory. Knows nothing of bundles or ONNX Runtime.

    machine   CPU threads and instructions that this process may use
    gpu       NVIDIA GPUs, asked through the driver's own libraries
    memory    free memory of the computer and of its GPUs
    forks     functions and locks for forked processes

This package imports the standard library only.
"""
