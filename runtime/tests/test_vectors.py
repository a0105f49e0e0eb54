"""The golden vectors, which readers in other languages compare with, are what this runtime computes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tiue_runtime import __version__

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("make_vectors", HERE / "make_vectors.py")
make_vectors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_vectors)


def read(name):
    return json.loads((make_vectors.VECTORS / name).read_text(encoding="ascii"))


@pytest.mark.parametrize("name", sorted(set(make_vectors.FILES) - {"pictures.json", "characters.json"}))
def test_vectors_are_what_the_runtime_computes(name):
    """`python make_vectors.py` writes the files. A difference means that bundles give other pictures than before."""
    assert read(name) == json.loads(json.dumps(make_vectors.FILES[name]()))


def test_pictures_are_what_the_runtime_computes():
    """Graphs round differently on other processors. So values may differ by little, and everything else by nothing."""
    golden, made = read("pictures.json"), json.loads(json.dumps(make_vectors.pictures()))
    for then, now in zip(golden, made, strict=True):
        exact = {"bundle", "prompts", "options", "seeds", "shape", "size"}
        assert {key: then[key] for key in exact} == {key: now[key] for key in exact}
        latents = [np.array(case["latents"], dtype=np.uint32).view(np.float32) for case in (then, now)]
        np.testing.assert_allclose(*latents, rtol=1e-6, atol=1e-6)
        for key in ("rgb", "previews"):
            for one, other in zip(then[key], now[key], strict=True):
                levels = [np.frombuffer(bytes.fromhex(each), dtype=np.uint8).astype(int) for each in (one, other)]
                assert np.abs(levels[0] - levels[1]).max(initial=0) <= 1


def test_characters_belong_to_the_same_sets():
    """All 1.1 million characters take half a minute. So this looks at the ends of the ranges, and beside them."""
    for case in read("characters.json"):
        belongs = make_vectors.CHARACTERS[case["set"]]
        for first, last in case["ranges"]:
            assert belongs(chr(first)) and belongs(chr(last))
            beside = [code for code in (first - 1, last + 1) if code >= 0 and not 0xD800 <= code < 0xE000]
            assert not any(belongs(chr(code)) for code in beside if code < 0x110000)


def test_closed_form_gives_the_golden_latents(closed_form):
    """The vectors do not only repeat what graphs computed: the tiny bundle has a closed form."""
    case = read("pictures.json")[0]
    z_0 = np.array(case["latents"], dtype=np.uint32).view(np.float32).reshape(case["shape"])[0]
    noise = make_vectors.gaussian(1, z_0.shape)
    np.testing.assert_allclose(z_0, closed_form(noise, "a red heart"), rtol=1e-5, atol=1e-5)


def test_the_package_for_javascript_has_the_same_version():
    package = json.loads((HERE.parent / "web" / "package.json").read_text(encoding="utf-8"))
    assert (package["name"], package["version"]) == ("tiue-runtime", __version__)
