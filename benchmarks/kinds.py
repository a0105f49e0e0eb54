"""The kinds of contenders, and the files that each kind loads, which are made once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import ROOT, SEED, CannotRun, Conditions, Entry
from benchmarks.installed import measure
from benchmarks.machine import GPUS, gpu_query
from benchmarks.peers import ddim_steps, noise_levels

_TORCH = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
# One of these wheels is installed. CUDA's libraries come by extras.
_ORT = ("onnxruntime", "onnxruntime-gpu[cuda,cudnn]", "onnxruntime-openvino")
_EXPORTS = {
    "fp32": ["--target", "portable,cpu"],
    "fp16": ["--target", "portable,cuda", "--precision", "fp16"],
    "int8": ["--target", "portable,cpu", "--precision", "int8"],
}
_STEPS = 4  # the step count of a bundle by default


@dataclass(frozen=True)
class Kind:
    """The properties that all contenders of a kind share."""

    algorithm: str  # contenders of one algorithm must make the same pictures
    loads: str  # "pipeline", "optimum" or "bundle"
    needs: tuple[str, ...]  # distributions, which are measured together with their requirements
    devices: tuple[str, ...]  # kinds of devices that it is measured on


KINDS = {
    "tiue": Kind("tiue", "bundle", ("tiue-runtime", *_ORT), ("cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx")),
    "torch": Kind("tiue", "pipeline", _TORCH, ("cpu", "cuda")),
    "diffusers": Kind("full", "pipeline", _TORCH, ("cpu", "cuda")),
    "optimum": Kind("full", "optimum", ("optimum-onnx", *_ORT, *_TORCH), ("cpu",)),
    "openvino": Kind("full", "optimum", ("openvino", "tokenizers", "numpy", "pillow"), ("cpu",)),
    "sdcpp": Kind("stable-diffusion.cpp's own", "pipeline", ("stable-diffusion-cpp-python",), ("cpu",)),
}


@dataclass(frozen=True)
class Spec:
    """A contender as a user names it: KIND or KIND:option=value,option=value.

    The options `device` and `bundle` are read here. The contender gets the others.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read one argument of --contenders. Raises BenchmarkError."""
        kind, colon, given = text.partition(":")
        pairs = [item.partition("=")[::2] for item in given.split(",")] if colon else []
        if kind not in KINDS or not all(name and value for name, value in pairs):
            expected = f"KIND or KIND:option=value,... with a kind of {', '.join(KINDS)}"
            raise BenchmarkError(f"--contenders: expected {expected}, got {text!r}")
        return cls(text, kind, {name: _value(value) for name, value in pairs})


@dataclass(frozen=True)
class Workplace:
    """The directory of all files, which are made when they are missing."""

    model: str  # one of pipelines.PIPELINES
    work: Path
    bundles: Mapping[str, Path]  # by the value of the option bundle=; others are work/MODEL-bundle-NAME
    pythons: Mapping[str, str]  # interpreters, by contender or by kind
    device: str  # of contenders that name none
    progress: Callable[[str], None]

    @property
    def pipeline(self) -> Path:
        """The diffusers pipeline directory."""
        return self.work / self.model

    def geometry(self, size: int | None) -> tuple[tuple[int, int, int], int]:
        """Make the pipeline, and return the geometry of a picture.

        Args:
            size: height and width in pixels, or None for the pipeline's own size.

        Returns:
            The shape (C, h, w) of latents, and the pixels per latent.

        Raises:
            BenchmarkError: the size is not a multiple of the pipeline's, or the pipeline could not be made.
        """
        self._make(self.pipeline, "benchmarks.pipelines", self.model, self.pipeline)
        unet, vae = (json.loads((self.pipeline / part / "config.json").read_text()) for part in ("unet", "vae"))
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        multiple = pixels * 2 ** (len(unet["block_out_channels"]) - 1)
        side, rest = divmod(unet["sample_size"] * pixels if size is None else size, multiple)
        if rest or not side:
            raise BenchmarkError(f"--size: expected a multiple of {multiple}, got {size}")
        side *= multiple // pixels
        return (unet["in_channels"], side, side), pixels

    def entry(self, spec: Spec, conditions: Conditions, *, tiny: bool, steps: Sequence[int] = ()) -> Entry:
        """Make the files that a contender loads.

        Args:
            spec: the contender.
            conditions: of the benchmark.
            tiny: whether bundles get a tiny VAE.
            steps: further step counts for bundles.

        Raises:
            CannotRun: the contender cannot be measured; the message is the reason.
        """
        kind, options = KINDS[spec.kind], dict(spec.options)
        device = options.pop("device", self.device)
        _check_device(device, kind)
        python = self.pythons.get(spec.name, self.pythons.get(spec.kind, sys.executable))
        if not shutil.which(python):
            raise CannotRun(f"no such interpreter: {python}")
        installed = measure(python, kind.needs)
        directory = self.pipeline
        if kind.loads == "bundle":
            name = options.pop("bundle", "fp16" if device.startswith("cuda") else "fp32")
            directory = self._bundle(name, tiny, sorted({conditions.steps, *steps}, reverse=True))
        elif kind.loads == "optimum":
            directory = self.work / f"{self.model}-optimum"
            self._make_or_skip(directory, "benchmarks.peers", self.pipeline, directory)
        if spec.kind in ("openvino", "sdcpp"):
            ddim = ddim_steps(self.pipeline, conditions.steps)
            if spec.kind == "openvino":
                options |= {"pipeline": str(self.pipeline), "shape": conditions.shape, "ddim": ddim}
            else:
                options |= {"sigmas": noise_levels(self.pipeline, [t for t, _, _ in ddim]), "seed": SEED}
        vae = options.get("vae", "kl")
        return Entry(spec.kind, directory, options, device, python, kind.algorithm, vae, installed)

    def _bundle(self, name: str, tiny: bool, steps: Sequence[int]) -> Path:
        if name in self.bundles:
            return self.bundles[name]
        if name not in _EXPORTS:
            raise CannotRun(f"bundle={name}: expected {', '.join(_EXPORTS)}, or --bundle {name}=DIRECTORY")
        flags: list[object] = [*_EXPORTS[name], "--steps", ",".join(map(str, steps))]
        if tiny:
            taesd = self.work / "taesd"
            self._make_or_skip(taesd, "benchmarks.pipelines", "taesd", taesd)
            flags += ["--vae", "kl,tiny", "--vae-path", taesd]
        suffix = "" if list(steps) == [_STEPS] else f"-steps{'-'.join(map(str, steps))}"
        suffix += "-tiny" if tiny else ""
        directory = self.work / f"{self.model}-bundle-{name}{suffix}"
        self._make_or_skip(directory, "export.onnx", "--ckpt", self.pipeline, "--out", directory, *flags)
        return directory

    def _make_or_skip(self, directory: Path, *command: object) -> None:
        try:
            self._make(directory, *command)
        except BenchmarkError as error:
            raise CannotRun(str(error)) from error

    def _make(self, directory: Path, *command: object) -> None:
        """Run a command in a process of its own, so that its memory is freed. Raises BenchmarkError."""
        if directory.exists():
            return
        self.progress(f"making {directory}")
        words = [sys.executable, "-m", *map(str, command)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # optimum would ask the Hub about local directories.
        done = subprocess.run(words, cwd=ROOT, env=offline, capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(words[1:])}: {' '.join(done.stderr.splitlines()[-1:])}")
        self.progress(done.stdout.splitlines()[-1])


def _check_device(device: str, kind: Kind) -> None:
    if device.partition(":")[0] not in kind.devices:
        raise CannotRun(f"it is measured on {', '.join(kind.devices)}, not on {device}")
    if device.startswith(GPUS):
        try:
            gpu_query("name")
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotRun(f"no GPU: nvidia-smi: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)  # for example true or 4
    except ValueError:
        return text
