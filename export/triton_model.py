"""The model of a Triton repository that clients ask for pictures. It runs in Triton's Python backend.

    F   = encoder(z_T, c)                   once
    z_0 = w_0 z_T + sum_i w_i eps_i         the decoder's graph returns the sum of all timesteps

The four graphs are models of their own, which Triton's ONNX Runtime backend runs. Tokens and noise come from the
package tiue-runtime, so a seed gives the picture that it gives there.
"""

import json
import secrets
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from tiue_runtime.bundle import (
    ATTENTION_MASK,
    CONTRIBUTION,
    IMAGE,
    INPUT_IDS,
    LATENTS,
    STEP_INDEX,
    STEP_WEIGHT,
    TEXT_ENCODER,
    TOKENIZER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
)
from tiue_runtime.errors import InferenceError, RequestError, TiueError
from tiue_runtime.images import to_unit
from tiue_runtime.noise import check_seed, gaussian
from tiue_runtime.tokenizer import PromptTokenizer

Shape = tuple[int, int, int]
"""The step count, and the height and width in pixels."""


class Wanted(NamedTuple):
    """A picture that a client wants."""

    prompt: str
    seed: int
    shape: Shape


class TritonPythonModel:
    """What Triton calls: `initialize` once, then `execute` with the requests that it gathered."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the student's settings and its tokenizer."""
        here = Path(__file__).parent
        self._name = args["model_name"]
        self._settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self._tokenizer = PromptTokenizer(here / TOKENIZER, self._settings["text_length"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests. Pictures of equal shape are drawn together."""
        answers: list[Any] = [None] * len(requests)
        together: dict[Shape, list[tuple[int, list[Wanted]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            try:
                wanted = self._read(request)
            except RequestError as error:
                answers[i] = _failed(error, triton.TritonError.INVALID_ARG)
            else:
                together[wanted[0].shape].append((i, wanted))
        for group in together.values():
            found = self._answers([wanted for _, wanted in group])
            for (i, _), answer in zip(group, found, strict=True):
                answers[i] = answer
        return answers

    def _answers(self, group: list[list[Wanted]]) -> list[Any]:
        """Draw the pictures of several requests together, and return an answer for each request."""
        try:
            pictures = self._draw([one for wanted in group for one in wanted])
        except (TiueError, triton.TritonModelException) as error:
            return [_failed(error, triton.TritonError.INTERNAL) for _ in group]
        ends = np.cumsum([len(wanted) for wanted in group])
        answers: list[Any] = []
        for wanted, mine in zip(group, np.split(pictures, ends[:-1]), strict=True):
            seeds = np.array([[one.seed] for one in wanted], dtype=np.uint64)
            tensors = [triton.Tensor("image", mine), triton.Tensor("seed", seeds)]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers

    def _read(self, request: Any) -> list[Wanted]:
        """Read a request's pictures, all of one shape. Raises RequestError."""
        settings = self._settings
        prompts = [_text(prompt) for prompt in _column(request, "prompt") or []]
        seeds = _column(request, "seed") or [secrets.randbits(32) for _ in prompts]
        height, width = settings["sizes"][0]
        defaults = {"steps": settings["default_steps"], "height": height, "width": width}
        columns = [_column(request, name) or [value] * len(prompts) for name, value in defaults.items()]
        shapes = set(zip(*columns, strict=True))
        if len(shapes) != 1:
            raise RequestError(f"steps, height, width: expected one value for a request, got {sorted(shapes)}")
        ((steps, height, width),) = shapes
        if str(steps) not in settings["schedules"]:
            known = ", ".join(settings["schedules"])
            raise RequestError(f"steps: this model was trained for {known}, got {steps}")
        if [height, width] not in settings["sizes"]:
            known = ", ".join(f"{columns}x{rows}" for rows, columns in settings["sizes"])
            raise RequestError(f"width, height: the model was made for {known}, got {width}x{height}")
        pairs = zip(prompts, seeds, strict=True)
        return [Wanted(prompt, check_seed(seed), (steps, height, width)) for prompt, seed in pairs]

    def _draw(self, wanted: list[Wanted]) -> NDArray[np.uint8]:
        """Draw pictures of one shape => (B, H, W, 3)."""
        settings = self._settings
        steps, height, width = wanted[0].shape
        scale = settings["pixels_per_latent"]
        shape = settings["latent_channels"], height // scale, width // scale
        schedule = settings["schedules"][str(steps)]

        tokens = self._tokenizer([one.prompt for one in wanted])
        mask = triton.Tensor(ATTENTION_MASK, tokens.attention_mask)
        text = self._run(TEXT_ENCODER, triton.Tensor(INPUT_IDS, tokens.input_ids), mask)
        z_T = np.stack([gaussian(one.seed, shape) for one in wanted])
        given = [triton.Tensor(LATENTS, z_T), *text]
        features = self._run(UNET_ENCODER, *given)
        index = triton.Tensor(STEP_INDEX, np.array(schedule["step_index"], dtype=np.int64))
        weight = triton.Tensor(STEP_WEIGHT, np.array(schedule["step_weights"], dtype=np.float32))
        contribution = self._read_out(UNET_DECODER, CONTRIBUTION, *given, *features, index, weight)
        z_0 = np.float32(schedule["noise_weight"]) * z_T + contribution
        unit = to_unit(self._read_out(VAE_DECODER, IMAGE, triton.Tensor(LATENTS, z_0)))
        return np.round(unit * np.float32(255)).astype(np.uint8)

    def _read_out(self, graph: str, output: str, *tensors: Any) -> NDArray[np.float32]:
        """Run a graph and return its output as an array. Raises InferenceError if it is not finite."""
        memory = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)
        (found,) = self._run(graph, *tensors, preferred_memory=memory)
        array = found.as_numpy()
        if not np.isfinite(array).all():
            raise InferenceError(f"{graph}: expected finite numbers in {output}, got others; export in fp32")
        return array

    def _run(self, graph: str, *tensors: Any, **options: Any) -> list[Any]:
        """Run a graph on those of the tensors that it takes. Its outputs stay on its device.

        Raises:
            TritonModelException: it failed.
        """
        signature = self._settings["graphs"][graph]
        request = triton.InferenceRequest(
            model_name=f"{self._name}_{graph}",
            requested_output_names=signature["outputs"],
            inputs=[tensor for tensor in tensors if tensor.name() in signature["inputs"]],
            **options,
        )
        response = request.exec()
        if response.has_error():
            raise triton.TritonModelException(response.error().message())
        return [triton.get_output_tensor_by_name(response, name) for name in signature["outputs"]]


def _column(request: Any, name: str) -> list[Any] | None:
    """Return the values (B, 1) of an input, or None."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()[:, 0].tolist()


def _text(prompt: bytes) -> str:
    try:
        return prompt.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"prompt: expected UTF-8, got other bytes at position {error.start}") from error


def _failed(error: Exception, code: int) -> Any:
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(str(error), code))
