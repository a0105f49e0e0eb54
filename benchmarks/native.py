"""Peers without PyTorch: OpenVINO by itself, and stable-diffusion.cpp. Both run the full UNet at every step."""

import ctypes
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import PROMPT

Float32 = NDArray[np.float32]
_OPENVINO = {"fp32": "f32", "bf16": "bf16"}
_CPP = {"fp32": "f32", "fp16": "f16"}


class OpenVino:
    """optimum's ONNX graphs in OpenVINO on the CPU, compiled for fixed shapes, with a plain DDIM loop."""

    def __init__(
        self,
        directory: Path,
        threads: int,
        *,
        pipeline: str,
        shape: Sequence[int],
        ddim: Sequence[tuple[int, float, float]],
        precision: str = "fp32",
    ):
        """Load and compile for a batch of 1. Another batch is compiled at its first request.

        Args:
            directory: the output of `peers.export_optimum`.
            threads: of the CPU.
            pipeline: the diffusers directory of that export. Its tokenizer and configurations are read.
            shape: (C, h, w) of one picture's latents.
            ddim: the steps, from `peers.ddim_steps`.
            precision: the precision that OpenVINO computes in, "fp32" or "bf16".

        Raises:
            RuntimeError: the CPU does not compute in that precision.
        """
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": _one_of("precision", precision, _OPENVINO),
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

        def compile(part: str, shapes: dict[str, Sequence[int]]) -> Any:
            model = core.read_model(directory / part / "model.onnx")
            model.reshape({name: list(sizes) for name, sizes in shapes.items()})
            compiled = core.compile_model(model, "CPU", options)
            granted = compiled.get_property("INFERENCE_PRECISION_HINT")
            if granted != getattr(openvino.Type, options["INFERENCE_PRECISION_HINT"]):
                raise RuntimeError(
                    f"precision: expected {precision}, got {granted.to_string()} from OpenVINO on this CPU"
                )
            return compiled

        self._compile = compile
        self._ids = _tokenize(Path(pipeline) / "tokenizer")
        self._text_encoder = compile("text_encoder", {"input_ids": self._ids.shape})
        vae = _read_json(Path(pipeline) / "vae/config.json")
        self._scale, self._shift = vae["scaling_factor"], vae.get("shift_factor") or 0.0
        self._text_width = _read_json(Path(pipeline) / "unet/config.json")["cross_attention_dim"]
        self._ddim = ddim
        self._compiled: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._at((1, *shape))

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """See contender.Contender."""
        seconds: dict[str, float] = {}
        z = self._sample(latents, seconds)
        with _adding(seconds, "vae_decoder"):
            image = _run(self._at(latents.shape)[1], {"latent_sample": z / self._scale + self._shift})
        # (B, 3, H, W) in [-1, 1] => (B, H, W, 3) in [0, 1]
        return np.clip(image / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), seconds

    def latents(self, latents: Float32, steps: int) -> Float32:
        """See contender.Contender."""
        return self._sample(latents, {})

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32, list[int]]:
        """See contender.Contender."""
        timesteps = [t for t, _, _ in self._ddim]
        return self._eps(latents, timesteps[0], self._text(len(latents))), timesteps

    def _sample(self, z: Float32, seconds: dict[str, float]) -> Float32:
        with _adding(seconds, "text_encoder"):
            text = self._text(len(z))
        for t, a, b in self._ddim:
            with _adding(seconds, "unet"):
                z = (a * z + b * self._eps(z, t, text)).astype(np.float32)
        return z

    def _text(self, batch: int) -> Float32:
        return np.repeat(_run(self._text_encoder, {"input_ids": self._ids}), batch, axis=0)

    def _eps(self, latents: Float32, t: int, text: Float32) -> Float32:
        feed = {"sample": latents, "timestep": np.float32(t), "encoder_hidden_states": text}
        return _run(self._at(latents.shape)[0], feed)

    def _at(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Return the UNet and the VAE decoder for latents (B, C, h, w)."""
        if shape not in self._compiled:
            text = (shape[0], self._ids.shape[1], self._text_width)
            unet = self._compile("unet", {"sample": shape, "timestep": (), "encoder_hidden_states": text})
            self._compiled[shape] = unet, self._compile("vae_decoder", {"latent_sample": shape})
        return self._compiled[shape]


class StableDiffusionCpp:
    """stable-diffusion.cpp on the CPU, through stable-diffusion-cpp-python, which reads diffusers directories itself.

    Its Euler method, in its units, is DDIM. It gets the noise levels of our timesteps, and makes the same noise from
    the seed. Its pictures differ from DDIM's all the same. It starts from pure noise, where DDIM takes the noise itself
    as z_t. It ends at noise 0. It hides its predictions.
    """

    def __init__(self, directory: Path, threads: int, *, sigmas: Sequence[float], seed: int, precision: str = "fp32"):
        """Load a pipeline.

        Args:
            directory: a diffusers pipeline directory.
            threads: of the CPU.
            sigmas: noise levels of the timesteps, sqrt(1/abar - 1).
            seed: of the first picture.
            precision: of the weights, "fp32" or "fp16".
        """
        import stable_diffusion_cpp as library

        self._said: list[str] = []
        # ctypes does not keep the callback alive, so this object does.
        self._log = library.sd_log_callback(lambda level, text, _: self._said.append(text.decode(errors="replace")))
        self._model = library.StableDiffusion(
            model_path=str(directory),
            n_threads=threads,
            wtype=_one_of("precision", precision, _CPP),
            vae_decode_only=True,
            verbose=False,
        )
        library.sd_set_log_callback(self._log, ctypes.c_void_p(0))
        self._sigmas, self._seed = sigmas, seed

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """See contender.Contender. Only the shape of `latents` is used. The stages are read from the log."""
        self._said.clear()
        images = self._model.generate_image(
            PROMPT,
            height=latents.shape[2] * 8,
            width=latents.shape[3] * 8,
            cfg_scale=1.0,
            sample_method="euler",
            sample_steps=steps,
            sigmas=",".join(map(str, [*self._sigmas, 0.0])),
            seed=self._seed,
            batch_count=len(latents),
        )
        said = {"text_encoder": "get_learned_condition", "unet": "sampling", "vae_decoder": "decode_first_stage"}
        log = "\n".join(self._said)
        found = {stage: re.findall(rf"\b{what} completed, taking ([\d.]+)", log) for stage, what in said.items()}
        seconds = {stage: sum(map(float, numbers)) for stage, numbers in found.items() if numbers}
        return np.stack([np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]), seconds

    def latents(self, latents: Float32, steps: int) -> None:
        """Return None: the program hides its latents."""

    def first_eps(self, latents: Float32, steps: int) -> tuple[None, list[int]]:
        """Return nothing: the program hides its predictions."""
        return None, []


def _one_of(name: str, value: str, allowed: dict[str, str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")
    return allowed[value]


def _run(compiled: Any, feed: dict[str, Any]) -> Float32:
    """Return a copy of the first output. The next run reuses its buffer."""
    return compiled(feed)[0].copy()


@contextmanager
def _adding(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _tokenize(directory: Path) -> NDArray[np.int64]:
    from tokenizers import Tokenizer

    config = _read_json(directory / "tokenizer_config.json")
    pad, length = config["pad_token"], config["model_max_length"]
    pad = pad if isinstance(pad, str) else pad["content"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return np.array([tokenizer.encode(PROMPT).ids], np.int64)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
