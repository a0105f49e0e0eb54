import shutil
import sys
from importlib.machinery import ModuleSpec

import pytest
from tiue_runtime.bundle import find
from tiue_runtime.bundle.find import find_bundle, installed_bundles
from tiue_runtime.errors import BundleError


@pytest.fixture
def installed(tmp_path, tiny, monkeypatch):
    """A site directory with a package that offers the tiny bundle as "small". Importing the package fails."""
    site = tmp_path / "site"
    shutil.copytree(tiny, site / "tiny_bundle_package")
    (site / "tiny_bundle_package" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = site / "tiny_bundle_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-bundle-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tiue_runtime.bundles]\nsmall = tiny_bundle_package\nlost = no_such_package\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv("TIUE_BUNDLE", raising=False)
    return site / "tiny_bundle_package"


def test_by_path(tiny):
    assert find_bundle(tiny) == find_bundle(str(tiny)) == tiny


def test_by_installed_name_without_importing_it(installed):
    assert find_bundle("small") == installed
    assert "tiny_bundle_package" not in sys.modules
    assert installed_bundles()["small"] == "tiny_bundle_package"


def test_a_compiled_package_is_located_by_its_origin(installed, monkeypatch):
    """As Nuitka describes a package that was not imported yet."""
    spec = ModuleSpec("tiny_bundle_package", None, origin=str(installed / "__init__.py"))
    spec.submodule_search_locations = []
    monkeypatch.setattr(find, "find_spec", lambda name: spec)
    assert find_bundle("small") == installed


def test_by_environment_variable(installed, tiny, monkeypatch):
    monkeypatch.setenv("TIUE_BUNDLE", "small")
    assert find_bundle() == installed
    assert find_bundle(tiny) == tiny
    monkeypatch.setenv("TIUE_BUNDLE", str(tiny))
    assert find_bundle() == tiny


def test_an_empty_name_is_not_the_default(installed, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    with pytest.raises(BundleError, match=r"bundle: expected a directory or the name .*, got an empty string"):
        find_bundle("")


def test_default_is_emoji(installed):
    (installed.parent / "tiny_bundle_package-1.0.dist-info" / "entry_points.txt").write_text(
        "[tiue_runtime.bundles]\nemoji = tiny_bundle_package\n"
    )
    assert find_bundle() == installed


def test_a_folder_of_the_same_name_hides_nothing(installed, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert find_bundle("small") == installed
    shutil.copytree(tiny, tmp_path / "small", dirs_exist_ok=True)
    assert str(find_bundle("small")) == "small"


def test_unknown_name_lists_what_is_installed(installed):
    with pytest.raises(BundleError, match=r"'emojis' is neither .*lost, small.*pip install .*emoji"):
        find_bundle("emojis")


def test_package_that_is_gone(installed):
    with pytest.raises(BundleError, match=r"'lost' is installed as package 'no_such_package', but there is no"):
        find_bundle("lost")


def test_path_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match=r"but .*none is not a directory"):
        find_bundle(str(tmp_path / "none"))
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        find_bundle(tmp_path)
