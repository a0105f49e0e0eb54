"""Features by an Inception v3 that was trained elsewhere: the one of the npm package nsfwjs 4.4.0 (MIT).

The package holds a Keras model for TensorFlow.js: a graph of layers as JSON, and weights as bytes, each with a scale
and an offset. Its convolutions are Inception v3's, trained on ImageNet and not trained further. This module runs that
graph in PyTorch up to the global average, whose 2,048 values are the usual features of a Frechet inception distance.
Because the weights have 8 bits, distances differ from those of the original network: compare them with each other only.
"""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiue.files import one_line

PACKAGE = "nsfwjs@4.4.0"
SIZE = 299  # pixels, height and width that the network takes
FEATURES = 2048

# Prints {"layers": [...], "weights": [...], "data": base64}. The package's files are JavaScript modules.
_READ = """
const path = require("path"), folder = process.argv[1];
const model = require(path.join(folder, "model.min.js"));
const group = model.weightsManifest[0];
const data = Buffer.concat(group.paths.map(
  name => Buffer.from(require(path.join(folder, name + ".min.js")), "base64")));
process.stdout.write(JSON.stringify({
  layers: model.modelTopology.model_config.config.layers, weights: group.weights, data: data.toString("base64")}));
"""


class Inception(nn.Module):
    """Pictures => features. Make one with `load_inception`."""

    def __init__(self, layers: list[dict[str, Any]], weights: dict[str, np.ndarray]):
        super().__init__()
        self._plan: list[tuple[str, str, dict[str, Any], list[str]]] = []
        for layer in layers:
            name, kind = layer["name"], layer["class_name"]
            if kind in ("Flatten", "GlobalAveragePooling2D", "Dense", "Dropout"):
                continue  # The classifier's own head.
            inputs = [node[0] for node in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else []
            self._plan.append((name, kind, layer["config"], inputs))
            for key in ("kernel", "beta", "moving_mean", "moving_variance"):
                if (value := weights.get(f"{name}/{key}")) is not None:
                    # Keras keeps a kernel as (height, width, in, out).
                    tensor = torch.from_numpy(value.transpose(3, 2, 0, 1).copy() if key == "kernel" else value)
                    self.register_buffer(_buffer(name, key), tensor)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of any size => features (B, 2048)."""
        x = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        values: dict[str, Tensor] = {}
        for name, kind, config, inputs in self._plan:
            given = [values[other] for other in inputs]
            values[name] = x if kind == "InputLayer" else self._layer(name, kind, config, given)
        return values[self._plan[-1][0]].mean(dim=(2, 3))

    def _layer(self, name: str, kind: str, config: dict[str, Any], given: list[Tensor]) -> Tensor:
        x = given[0]
        if kind == "Conv2D":
            kernel, stride = self._weight(name, "kernel"), config["strides"]
            padding = [size // 2 for size in kernel.shape[2:]] if config["padding"] == "same" else 0
            return F.conv2d(x, kernel, stride=stride, padding=padding)
        if kind == "BatchNormalization":
            mean, variance = self._weight(name, "moving_mean"), self._weight(name, "moving_variance")
            return F.batch_norm(x, mean, variance, None, self._weight(name, "beta"), eps=config["epsilon"])
        if kind == "Activation":
            return F.relu(x)
        if kind == "MaxPooling2D":
            return F.max_pool2d(x, config["pool_size"], config["strides"])
        if kind == "AveragePooling2D":
            padding = [size // 2 if config["padding"] == "same" else 0 for size in config["pool_size"]]
            # TensorFlow does not count the padding in an average.
            return F.avg_pool2d(x, config["pool_size"], config["strides"], padding, count_include_pad=False)
        if kind == "Concatenate":
            return torch.cat(given, dim=1)
        raise ValueError(f"layer {name}: expected a layer of Inception v3, got {kind}")

    def _weight(self, name: str, key: str) -> Tensor:
        return self.get_buffer(_buffer(name, key))


def load_inception(package: Path) -> Inception:
    """Read the network from an unpacked npm package, with Node.

    Args:
        package: the folder `package` of nsfwjs 4.4.0, as `npm pack` and `tar` leave it.

    Raises:
        ValueError: the folder holds no such model, or Node is not installed or fails.
    """
    folder = package / "dist/models/inception_v3"
    if not (folder / "model.min.js").is_file():
        raise ValueError(f"{package}: expected the unpacked npm package {PACKAGE}, found no Inception v3 in it")
    try:
        done = subprocess.run(["node", "-e", _READ, str(folder.resolve())], capture_output=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("the npm package is JavaScript: reading it needs Node, which is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{package}: Node cannot read the model: {error.stderr.decode()[-200:]}") from error
    try:
        content = json.loads(done.stdout)
        return Inception(content["layers"], _weights(content)).eval()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{package}: the model of {PACKAGE} is damaged: {one_line(error)}") from error


def _weights(content: dict[str, Any]) -> dict[str, np.ndarray]:
    """Turn bytes into float32 arrays by name: byte * scale + min."""
    data, offset, weights = base64.b64decode(content["data"]), 0, {}
    for entry in content["weights"]:
        count, rule = int(np.prod(entry["shape"])), entry["quantization"]
        values = np.frombuffer(data, np.dtype(rule["dtype"]), count, offset)
        offset += values.nbytes
        weights[entry["name"]] = (values * rule["scale"] + rule["min"]).astype(np.float32).reshape(entry["shape"])
    return weights


def _buffer(name: str, key: str) -> str:
    return f"{name}__{key}"
