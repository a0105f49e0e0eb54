import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiue_runtime

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime")


def modules_after(code: str) -> set[str]:
    """Return the top-level modules of a new interpreter after `code`."""
    report = "import sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light():
    assert not modules_after("import tiue_runtime") & {*HEAVY, "numpy", "PIL", "tokenizers"}


def test_importing_the_pipeline_loads_neither_numpy_nor_metadata_of_packages():
    code = "from tiue_runtime import Pipeline, Progress, Cancelled"
    assert not modules_after(code) & {*HEAVY, "numpy", "PIL", "tokenizers", "asyncio", "importlib_metadata", "hashlib"}


PACKAGE = Path(tiue_runtime.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.name.startswith("_") and "_pyinstaller" not in path.parts  # which only PyInstaller imports
)


WITHOUT_EXTRA = ("serve", "serve.jobs", "serve.worker", "serve.server_settings")


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_training_library_or_onnxruntime(module):
    if module.startswith("serve.") and module not in WITHOUT_EXTRA:
        pytest.importorskip("starlette")
    if module == "tools.mcp_server":
        pytest.importorskip("mcp")
    assert not modules_after(f"import tiue_runtime.{module}") & set(HEAVY)


@pytest.mark.parametrize(
    ("missing", "module"), [("starlette", "app"), ("python_multipart", "app"), ("uvicorn", "server")]
)
def test_without_the_packages_of_the_server_the_remedy_is_one_line(missing, module):
    pytest.importorskip("starlette")
    code = f"import sys; sys.modules[{missing!r}] = None\nimport tiue_runtime.serve.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"the package {missing}: pip install starlette uvicorn" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", WITHOUT_EXTRA)
def test_the_queue_works_without_the_packages_of_the_server(module):
    assert not modules_after(f"import tiue_runtime.{module}") & {"starlette", "uvicorn", "prometheus_client"}


def test_the_contract_needs_the_standard_library_only():
    assert not modules_after("import tiue_runtime.bundle") & {"numpy", "PIL", "tokenizers"}


def test_making_a_picture_imports_no_training_library(tiny):
    code = f"import tiue_runtime; tiue_runtime.generate('a', bundle={str(tiny)!r}, device='cpu')"
    loaded = modules_after(code)
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "onnx"}


def test_public_names_exist():
    assert all(getattr(tiue_runtime, name) is not None for name in tiue_runtime.__all__)
    assert dir(tiue_runtime) == sorted(tiue_runtime.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'gnerate'"):
        tiue_runtime.gnerate  # noqa: B018


def test_errors_are_value_errors():
    for name in ("BundleError", "DeviceError", "RequestError", "Cancelled", "InferenceError"):
        assert issubclass(getattr(tiue_runtime, name), tiue_runtime.TiueError)
    assert issubclass(tiue_runtime.TiueError, ValueError)
