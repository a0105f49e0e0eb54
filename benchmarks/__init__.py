"""What pictures and training cost: time and memory of TiUE beside programs that run the same UNet.

    latency     one picture, by contender       scaling    by batch, timesteps and resolution
    exporting   an export, by stage             training   updates, ours beside the authors' loop
    memory      the peak of a distillation, by option
    gpu         what only a GPU can show, in parts, within a time limit

Modules behind them:
    kinds, contender, comparing, agreement      contenders: made, run in processes of their own, timed, compared
    eager, peers, native                        contenders beside `tiue`
    pipelines                                   Stable Diffusion pipelines of true size with random weights
    machine, installed, flops, report           conditions, sizes of installations, operations, tables and charts
"""

import os

# This must be set before anything imports ONNX Runtime. Child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
