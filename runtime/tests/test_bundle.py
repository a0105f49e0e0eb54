import json
import re
from dataclasses import replace

import pytest
from tiue_runtime.bundle import GRAPHS, Bundle, Manifest, MemoryUse, Schedule, write_bundle
from tiue_runtime.errors import BundleError


def put(path, value):
    """A change of bundle.json: put("a.b", 1) sets content["a"]["b"] = 1."""

    def change(content):
        *parents, last = path.split("/")
        for parent in parents:
            content = content[parent]
        content[last] = value

    return change


def drop(path):
    return lambda content: content.pop(path)


def rename(old, new):
    def change(content):
        content["files"][new] = content["files"].pop(old)
        content["variants"]["portable"]["vae_decoder"] = new

    return change


WRONG = {
    "newer format": (put("format", 2), "reads 1, got 2: written by a newer tiue; upgrade tiue-runtime"),
    "older format": (put("format", 0), "format: expected 1, got 0"),
    "no format": (drop("format"), "format: expected an integer, got None (null)"),
    "missing field": (drop("text_length"), "missing field text_length"),
    "unknown field": (put("colour", 1), "unknown field colour"),
    "unknown nested field": (put("schedules/4/x", 1), "unknown field schedules.4.x"),
    "missing nested field": (
        put("schedules/4", {"timesteps": [1], "noise_weight": 1}),
        "missing field schedules.4.step_weights",
    ),
    "text for a number": (put("text_length", "8"), "text_length: expected an integer, got '8' (str)"),
    "float for an integer": (put("latent_channels", 4.0), "latent_channels: expected an integer, got 4.0"),
    "true for an integer": (put("latent_channels", True), "latent_channels: expected an integer, got True"),
    "text for a float": (put("vae_scaling_factor", "x"), "vae_scaling_factor: expected a number"),
    "number for text": (put("name", 1), "name: expected a string, got 1"),
    "number in a map of texts": (put("created_from/x", 1), "created_from.x: expected a string, got 1"),
    "number for a list": (put("decoder_timesteps", 1), "decoder_timesteps: expected a list, got 1"),
    "text in a list": (put("decoder_timesteps", ["1"]), "decoder_timesteps[0]: expected an integer"),
    "list for an object": (put("schedules", []), "schedules: expected an object, got []"),
    "empty name": (put("name", ""), "name: expected a name"),
    "no channels": (put("latent_channels", 0), "latent_channels: expected a positive integer, got 0"),
    "multiple": (put("size_multiple", 3), "size_multiple: expected a multiple of pixels_per_latent (2)"),
    "default size": (put("default_width", 10), "default_width: expected a positive multiple of size_m"),
    "zero scaling": (put("vae_scaling_factor", 0), "vae_scaling_factor: expected a finite number, not 0"),
    "infinite shift": (put("vae_shift_factor", float("inf")), "vae_shift_factor: expected a finite number"),
    "precision": (put("precision", "fp8"), "precision: expected one of fp32, fp16, bf16, int8, got 'fp8'"),
    "repeated row": (put("decoder_timesteps", [751, 501, 251, 251, 1]), "decoder_timesteps: expected dis"),
    "no row": (put("decoder_timesteps", []), "decoder_timesteps: expected distinct timesteps"),
    "encoder timestep": (put("encoder_timestep", -1), "encoder_timestep: expected an integer >= 0, got -1"),
    "too few weights": (
        put("schedules/4/step_weights", [1, 2, 3]),
        "schedules.4: expected 4 timesteps and 4 step_weights, got '4 and 3'",
    ),
    "too many timesteps": (
        put("schedules/2/timesteps", [751, 501, 1]),
        "schedules.2: expected 2 timesteps and 2 step_weights, got '3 and 2'",
    ),
    "NaN weight": (put("schedules/4/noise_weight", float("nan")), "schedules.4: expected finite weights"),
    "infinite weight": (
        put("schedules/2/step_weights", [1, float("inf")]),
        "schedules.2: expected finite weights",
    ),
    "rising timesteps": (
        put("schedules/2/timesteps", [1, 501]),
        "schedules.2.timesteps: expected decreasing timesteps",
    ),
    "absent timestep": (
        put("schedules/2/timesteps", [500, 1]),
        "schedules.2.timesteps: expected timesteps of decoder_timesteps (751, 501, 251, 1), got [500]",
    ),
    "key of a schedule": (
        put("schedules/four", {"timesteps": [1], "noise_weight": 1, "step_weights": [1]}),
        "schedules: expected step counts such as '4' as keys, got 'four'",
    ),
    "default steps": (put("default_steps", 3), "default_steps: expected a step count of schedules (2, 4)"),
    "no variant": (put("variants", {}), "variants: expected a variant, such as 'portable', got 'none'"),
    "graph missing": (
        put("variants/portable", {"unet_encoder": "x.onnx"}),
        "variants.portable: expected text",
    ),
    "graph not listed": (
        put("variants/portable/vae_decoder", "other.onnx"),
        "files: expected an entry for other.onnx",
    ),
    "unknown vae": (put("vaes", {"large": "vae_decoder"}), "vaes: expected kinds among kl, tiny, at least one, got"),
    "no vae": (put("vaes", {}), "vaes: expected kinds among kl, tiny, at least one, got []"),
    "default vae": (put("vaes", {"tiny": "vae_decoder_tiny"}), "vaes.tiny: expected vae_decoder, got 'vae_dec"),
    "second vae": (
        put("vaes", {"kl": "vae_decoder", "tiny": "vae_decoder"}),
        "vaes.tiny: expected vae_decoder_tiny, got 'vae_decoder'",
    ),
    "vae without graph": (
        put("vaes", {"kl": "vae_decoder", "tiny": "vae_decoder_tiny"}),
        "variants.portable: expected text_encoder, unet_encoder, unet_decoder, vae_decoder, vae_decoder_tiny, got",
    ),
    "memory of no variant": (put("memory", {"cuda": {}}), "memory: expected variants among portable, got 'cuda'"),
    "memory of no graph": (
        put("memory", {"portable": {"vae": {"per_latent": 1, "per_latent_squared": 0}}}),
        "memory.portable: expected graphs among text_encoder, unet_encoder, unet_decoder, vae_decoder, got 'vae'",
    ),
    "negative memory": (
        put("memory", {"portable": {"vae_decoder": {"per_latent": -1, "per_latent_squared": 0}}}),
        "memory.portable.vae_decoder: expected bytes >= 0, got (-1.0, 0.0)",
    ),
    "half a memory": (
        put("memory", {"portable": {"vae_decoder": {"per_latent": 1}}}),
        "missing field memory.portable.vae_decoder.per_latent_squared",
    ),
    "no files": (put("files", {}), "files: expected an entry for every file but bundle.json"),
    "negative size": (put("files/README.md/size", -1), "files.README.md.size: expected bytes >= 0"),
    "short sha256": (put("files/README.md/sha256", "ab"), "files.README.md.sha256: expected 64 lower-case"),
    "wrong size": (put("files/README.md/size", 31), "README.md: expected 31 bytes, found 30"),
    "absolute name": (rename("vae_decoder.onnx", "/etc/passwd"), "files: expected names relative to"),
    "parent": (rename("vae_decoder.onnx", "../x.onnx"), "files: expected names relative to"),
    "hidden parent": (rename("vae_decoder.onnx", "a/../../x"), "files: expected names relative to"),
    "backslash": (rename("vae_decoder.onnx", "..\\x.onnx"), "files: expected names relative to"),
    "drive": (rename("vae_decoder.onnx", "C:x.onnx"), "files: expected names relative to"),
    "missing file": (rename("vae_decoder.onnx", "no.onnx"), "no.onnx is missing"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_refuses(edit, change, message):
    directory = edit(change)
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        Bundle.load(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_every_field(tiny):
    manifest = Bundle.load(tiny).manifest
    assert (manifest.name, manifest.licence, manifest.precision) == ("tiny", "Apache-2.0", "fp32")
    assert (manifest.default_height, manifest.default_width, manifest.size_multiple) == (8, 12, 4)
    assert (manifest.vae_scaling_factor, manifest.vae_shift_factor) == (0.5, 0.25)
    assert manifest.schedules[2] == Schedule((501, 1), 0.3, (-0.5, 0.25))
    assert (manifest.step_rows(2), manifest.step_rows(4)) == ((1, 3), (0, 1, 2, 3))


@pytest.mark.parametrize("name, default", [("vae_shift_factor", 0), ("vaes", {"kl": "vae_decoder"}), ("memory", {})])
def test_what_older_bundles_lack(edit, name, default):
    manifest = Bundle.load(edit(lambda content: content.pop(name, None))).manifest
    assert getattr(manifest, name) == default


@pytest.mark.parametrize("text, message", [("{", "expected JSON"), ("[]", "expected an object"), ("\xff", "decode")])
def test_refuses_other_text(copy, text, message):
    (copy / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_refuses_a_directory_without_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: expected a file bundle\.json"):
        Bundle.load(tmp_path)


def test_verify_names_the_tampered_files(copy):
    bundle = Bundle.load(copy)
    bundle.verify()
    for name in ("vae_decoder.onnx", "README.md"):
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
    Bundle.load(copy)  # the sizes are right
    with pytest.raises(BundleError, match=r"differs from bundle\.json: README\.md, vae_decoder\.onnx\."):
        bundle.verify()


def test_written_is_read_back(copy):
    (copy / "data").mkdir()
    (copy / "data" / "weights.data").write_bytes(b"12345")
    manifest = Bundle.load(copy).manifest
    written = write_bundle(copy, manifest)
    assert written == Bundle.load(copy)
    assert written.manifest.files["data/weights.data"].size == 5
    assert set(written.manifest.files) == {*manifest.files, "data/weights.data"}
    assert not list(copy.glob("*.tmp")) and not list(copy.glob(".*"))
    written.verify()


def test_a_second_vae_and_memory_are_written_and_read_back(copy):
    manifest = Bundle.load(copy).manifest
    (copy / "vae_decoder_tiny.onnx").write_bytes((copy / "vae_decoder.onnx").read_bytes())
    memory = {"portable": {"vae_decoder_tiny": MemoryUse(per_latent=10, per_latent_squared=2)}}
    written = write_bundle(
        copy,
        replace(
            manifest,
            vaes={"kl": "vae_decoder", "tiny": "vae_decoder_tiny"},
            variants={"portable": {**manifest.variants["portable"], "vae_decoder_tiny": "vae_decoder_tiny.onnx"}},
            memory=memory,
            files={},
        ),
    ).manifest
    assert written.graphs == (*GRAPHS, "vae_decoder_tiny") and list(written.vaes) == ["kl", "tiny"]
    assert written.memory == memory
    assert memory["portable"]["vae_decoder_tiny"].bytes(rows=3, latents=4) == 3 * (10 * 4 + 2 * 16)


def test_writing_needs_every_file(copy):
    manifest = Bundle.load(copy).manifest
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing; write it before bundle\.json"):
        write_bundle(copy, manifest)


def test_manifest_checks_what_the_exporter_gives(tiny):
    content = {**vars(Bundle.load(tiny).manifest), "default_steps": 7}
    with pytest.raises(BundleError, match="default_steps: expected a step count of schedules"):
        Manifest(**content)


def test_committed_bundle_is_format_1(tiny):
    assert json.loads((tiny / "bundle.json").read_text(encoding="utf-8"))["format"] == 1
    Bundle.load(tiny).verify()
