"""The machine of a measurement and its packages."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from typing import Any

from tiue_runtime.host.machine import thread_count

from benchmarks.comparing import CannotRun
from benchmarks.machine import cpu_name, gpu_query

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
# One of these wheels is installed.
_PACKAGES += ("onnxruntime", "onnxruntime-gpu")


def conditions(dry_run: bool) -> dict[str, Any]:
    """Return GPU and driver, CPU and threads, system and versions. Raises CannotRun as `gpu_field`."""
    return {
        "gpu": "none: a dry run" if dry_run else gpu_field("name,driver_version,memory.total") + " MiB",
        "cpu": f"{cpu_name()}, {thread_count()} threads",
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def gpu_field(field: str) -> str:
    """Return a field of the first GPU, named as in nvidia-smi's --query-gpu.

    Raises:
        CannotRun: nvidia-smi shows no GPU.
    """
    try:
        return gpu_query(field)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotRun(f"no GPU: nvidia-smi: {error}") from error


def check_provider(provider: str) -> None:
    """Raise CannotRun unless the installed ONNX Runtime has this provider."""
    import onnxruntime

    found = onnxruntime.get_available_providers()
    if provider not in found:
        raise CannotRun(
            f"expected {provider}, the installed ONNX Runtime {onnxruntime.__version__} has {', '.join(found)}; "
            'replace it: pip install "onnxruntime-gpu[cuda,cudnn]"'
        )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
