"""A stand-in for Triton: it reads the configurations of a repository, and runs its models with ONNX Runtime.

It refuses what Triton refuses: a tensor of a name, type or shape that config.pbtxt does not have.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

TYPES = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_UINT8": np.uint8,
    "TYPE_STRING": np.object_,
}
_TENSOR = re.compile(
    r'(input|output) \{ name: "(.+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]( optional: true)? \}', re.M
)


class Declared(NamedTuple):
    name: str
    kind: str
    dims: list[int]
    optional: bool


class Config(NamedTuple):
    name: str
    backend: str
    max_batch_size: int
    inputs: list[Declared]
    outputs: list[Declared]


def read_config(path: Path) -> Config:
    text = path.read_text(encoding="utf-8")
    tensors: dict[str, list[Declared]] = {"input": [], "output": []}
    for field, name, kind, dims, optional in _TENSOR.findall(text):
        tensors[field].append(Declared(name, kind, [int(dim) for dim in dims.split(",")], bool(optional)))
    scalars = dict(re.findall(r'^(\w+): "?([^"\n]+)"?$', text, re.M))
    most = int(scalars["max_batch_size"])
    return Config(scalars["name"], scalars["backend"], most, tensors["input"], tensors["output"])


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Server:
    """Loads the repository's ONNX models, and its Python model with this server as its module."""

    def __init__(self, repository: Path, name: str) -> None:
        self.repository, self.runs, self.sessions = repository, [], {}
        self.config = read_config(repository / name / "config.pbtxt")
        path = repository / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location("triton_python_model", path)
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get("triton_python_backend_utils")
        sys.modules["triton_python_backend_utils"] = self._module()
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules["triton_python_backend_utils"]
            if before:
                sys.modules["triton_python_backend_utils"] = before
        self.model = module.TritonPythonModel()
        self.model.initialize({"model_name": name, "model_version": "1"})

    def infer(self, *requests: dict[str, Any]) -> list[InferenceResponse]:
        """Answer requests that arrive together: values by the name of the input, one for each picture."""
        kinds = {tensor.name: TYPES[tensor.kind] for tensor in self.config.inputs}
        given = []
        for request in requests:
            arrays = {name: np.array(list(values), kinds[name]).reshape(-1, 1) for name, values in request.items()}
            _check(self.config, arrays)
            given.append([Tensor(name, array) for name, array in arrays.items()])
        answers = self.model.execute(given)
        assert len(answers) == len(requests) and None not in answers
        for answer in answers:
            for declared in self.config.outputs if not answer.has_error() else ():
                _check_tensor(declared, answer.tensors[declared.name].as_numpy(), batched=True)
        return answers

    def run(self, model_name: str, outputs: list[str], inputs: list[Tensor]) -> InferenceResponse:
        config = read_config(self.repository / model_name / "config.pbtxt")
        arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        _check(config, arrays)
        assert set(outputs) <= {tensor.name for tensor in config.outputs}
        if model_name not in self.sessions:
            path = self.repository / model_name / "1" / "model.onnx"
            self.sessions[model_name] = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.runs.append(model_name)
        try:
            made = self.sessions[model_name].run(outputs, arrays)
        except Exception as error:
            return InferenceResponse([], TritonError(str(error)))
        return InferenceResponse([Tensor(name, array) for name, array in zip(outputs, made, strict=True)])

    def _module(self) -> ModuleType:
        server = self

        class InferenceRequest:
            def __init__(self, model_name, requested_output_names, inputs, preferred_memory=None):
                self.given = model_name, requested_output_names, inputs

            def exec(self) -> InferenceResponse:
                return server.run(*self.given)

        module: Any = ModuleType("triton_python_backend_utils")
        module.Tensor, module.TritonError, module.TritonModelException = Tensor, TritonError, TritonModelException
        module.InferenceRequest, module.InferenceResponse = InferenceRequest, InferenceResponse
        module.TRITONSERVER_MEMORY_CPU = 0
        module.PreferredMemory = lambda kind, device: (kind, device)
        module.get_output_tensor_by_name = lambda response, name: response.tensors.get(name)
        module.get_input_tensor_by_name = lambda request, name: next((t for t in request if t.name() == name), None)
        return module


def _check(config: Config, arrays: dict[str, np.ndarray]) -> None:
    declared = {tensor.name: tensor for tensor in config.inputs}
    assert arrays.keys() <= declared.keys(), arrays.keys() - declared.keys()
    needed = {tensor.name for tensor in config.inputs if not tensor.optional}
    assert needed <= arrays.keys(), needed - arrays.keys()
    for name, array in arrays.items():
        _check_tensor(declared[name], array, batched=config.max_batch_size > 0)


def _check_tensor(declared: Declared, array: np.ndarray, *, batched: bool) -> None:
    assert array.dtype == TYPES[declared.kind], (declared, array.dtype)
    shape = array.shape[1:] if batched else array.shape
    assert len(shape) == len(declared.dims), (declared, array.shape)
    assert all(dim in (-1, side) for dim, side in zip(declared.dims, shape, strict=True)), (declared, array.shape)
