"""What an application that imports tiue_runtime needs beside its code.

- the bundles of installed packages, and the metadata by which they are found
- modules that are imported by name when they are first used; `tools`, `hub` and `serve` only if the program imports
  them
- the metadata of the libraries whose versions are checked
"""

from importlib.metadata import PackageNotFoundError, entry_points

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

# `__main__` imports `tools`, which imports the other two and all that they need.
_OPTIONAL = tuple(f"tiue_runtime.{name}" for name in ("__main__", "tools", "hub", "serve", "_pyinstaller"))

datas = collect_data_files("tiue_runtime")
for _entry in entry_points(group="tiue_runtime.bundles"):
    datas += collect_data_files(_entry.value, include_py_files=True)
    if _entry.dist is not None:
        datas += copy_metadata(_entry.dist.name)
for _name in (
    "tiue-runtime",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "numpy",
    "pillow",
    "tokenizers",
):
    try:
        datas += copy_metadata(_name)
    except PackageNotFoundError:
        continue

hiddenimports = [
    "onnxruntime",
    *(_entry.value for _entry in entry_points(group="tiue_runtime.bundles")),
    *collect_submodules("tiue_runtime", filter=lambda name: not name.startswith(_OPTIONAL)),
]
