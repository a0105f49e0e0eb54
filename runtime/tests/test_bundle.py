import json
import os
import re
from dataclasses import replace
from functools import reduce

import pytest
from tiue_runtime.bundle import GRAPHS, Bundle, Manifest, MemoryUse, Preview, SafetyChecker, Schedule, write_bundle
from tiue_runtime.errors import BundleError


def put(path, value):
    """Make a change of bundle.json: put("a/b", 1) sets content["a"]["b"] = 1."""

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
    "newer format": (put("format", 2), "reads 1, got 2: written by a newer tiue; install a newer tiue-runtime"),
    "older format": (put("format", 0), "format: expected 1, got 0"),
    "no format": (drop("format"), "format: expected an integer, got None"),
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
    "text for a float": (put("schedules/4/noise_weight", "x"), "schedules.4.noise_weight: expected a number, got"),
    "true for a float": (
        put("schedules/4/noise_weight", True),
        "schedules.4.noise_weight: expected a number, got True",
    ),
    "null for an optional field": (put("preview", None), "preview: expected an object, got None (null)"),
    "number for text": (put("name", 1), "name: expected a string, got 1"),
    "number in a map of texts": (put("created_from/x", 1), "created_from.x: expected a string, got 1"),
    "number for a list": (put("decoder_timesteps", 1), "decoder_timesteps: expected a list, got 1"),
    "text in a list": (put("decoder_timesteps", ["1"]), "decoder_timesteps[0]: expected an integer"),
    "list for an object": (put("schedules", []), "schedules: expected an object, got []"),
    "empty name": (put("name", ""), "name: expected 1 to 200 characters, got 0"),
    "control characters": (put("name", "a\x1b[2J"), "name: expected printable characters, got 'a\\x1b[2J'"),
    "no channels": (put("latent_channels", 0), "latent_channels: expected a number >= 1 and <= 1,024, got 0"),
    "multiple": (put("size_multiple", 3), "size_multiple: expected a multiple of pixels_per_latent (2)"),
    "default size": (put("default_width", 10), "default_width: expected a positive multiple of size_m"),
    "precision": (put("precision", "fp8"), "precision: expected one of fp32, fp16, bf16, int8, got 'fp8'"),
    "weights": (put("weights", "int4"), "weights: expected one of fp32, fp16, bf16, int8, got 'int4'"),
    "repeated row": (
        put("decoder_timesteps", [751, 501, 251, 251, 1]),
        "decoder_timesteps: expected distinct timesteps",
    ),
    "no row": (put("decoder_timesteps", []), "decoder_timesteps: expected 1 to 1,000 items, got 0"),
    "encoder timestep": (
        put("encoder_timestep", -1),
        "encoder_timestep: expected a number >= 0 and <= 999,999, got -1",
    ),
    "too few weights": (
        put("schedules/4/step_weights", [1, 2, 3]),
        "schedules.4: expected 4 timesteps and 4 step_weights, got '4 and 3'",
    ),
    "too many timesteps": (
        put("schedules/2/timesteps", [751, 501, 1]),
        "schedules.2: expected 2 timesteps and 2 step_weights, got '3 and 2'",
    ),
    "rising timesteps": (
        put("schedules/2/timesteps", [1, 501]),
        "schedules.2.timesteps: expected decreasing timesteps",
    ),
    "absent timestep": (
        put("schedules/2/timesteps", [500, 1]),
        "schedules.2.timesteps: expected timesteps of decoder_timesteps, got [500]",
    ),
    "key of a schedule": (
        put("schedules/four", {"timesteps": [1], "noise_weight": 1, "step_weights": [1]}),
        "schedules: expected step counts as keys, for example '4', got 'four'",
    ),
    "default steps": (put("default_steps", 3), "default_steps: expected a step count of schedules (2, 4)"),
    "no variant": (put("variants", {}), "variants: expected 1 to 100 entries, got 0"),
    "graph missing": (
        put("variants/portable", {"unet_encoder": "x.onnx"}),
        "variants.portable: expected the graphs text",
    ),
    "graph not listed": (
        put("variants/portable/vae_decoder", "other.onnx"),
        "files: expected an entry for other.onnx",
    ),
    "unknown vae": (put("vaes", ["large"]), "vaes[0]: expected one of kl, tiny, got 'large'"),
    "no vae": (put("vaes", []), "vaes: expected 1 to 2 items, got 0"),
    "a vae twice": (put("vaes", ["kl", "kl"]), "vaes: expected different kinds, got ('kl', 'kl')"),
    "vae without graph": (
        put("vaes", ["kl", "tiny"]),
        "variants.portable: expected the graphs text_encoder, unet_encoder, unet_decoder, vae_decoder, "
        "vae_decoder_tiny, got",
    ),
    "a checker in one variant of two": (
        lambda content: content["variants"].update(
            cpu={**content["variants"]["portable"], "safety_checker": "vae_decoder.onnx"}
        ),
        "variants.portable: expected the graphs text_encoder, unet_encoder, unet_decoder, vae_decoder, safety_checker",
    ),
    "a graph that is no ONNX file": (
        put("variants/portable/vae_decoder", "README.md"),
        "variants.portable.vae_decoder: expected a file name inside the bundle that ends in .onnx, got 'README.md'",
    ),
    "a size": (put("sizes", [[8, 10]]), "sizes[0][1]: expected a positive multiple of size_multiple (4), got 10"),
    "half a size": (put("sizes", [[8]]), "sizes[0]: expected 2 items, got 1"),
    "rows of the preview": (put("preview/matrix", [[1, 0, 0]]), "preview.matrix: expected 4 rows, got 1"),
    "columns of the preview": (put("preview/matrix", [[1, 0]] * 4), "preview.matrix[0]: expected 3 items, got 2"),
    "an example that is none": (put("prompts/examples", [1]), "prompts.examples[0]: expected a string, got 1"),
    "memory of no variant": (put("memory", {"cuda": {}}), "memory: expected variants among portable, got 'cuda'"),
    "memory of no graph": (
        put("memory", {"portable": {"vae": {"per_latent": 1, "per_latent_squared": 0}}}),
        "memory.portable: expected graphs among text_encoder, unet_encoder, unet_decoder, vae_decoder, got 'vae'",
    ),
    "negative memory": (
        put("memory", {"portable": {"vae_decoder": {"per_latent": -1, "per_latent_squared": 0}}}),
        "memory.portable.vae_decoder.per_latent: expected a number >= 0, got -1",
    ),
    "half a memory": (
        put("memory", {"portable": {"vae_decoder": {"per_latent": 1}}}),
        "missing field memory.portable.vae_decoder.per_latent_squared",
    ),
    "no files": (put("files", {}), "files: expected 1 to 10,000 entries, got 0"),
    "negative size": (put("files/README.md/size", -1), "files.README.md.size: expected a number >= 0"),
    "short sha256": (put("files/README.md/sha256", "ab"), "files.README.md.sha256: expected ^[0-9a-f]{64}$, got 'ab'"),
    "wrong size": (put("files/README.md/size", 31), "README.md: expected 31 bytes, found 30"),
    "absolute name": (
        rename("vae_decoder.onnx", "/etc/passwd"),
        "expected a file name inside the bundle that ends in .onnx, got ",
    ),
    "parent": (
        rename("vae_decoder.onnx", "../x.onnx"),
        "expected a file name inside the bundle that ends in .onnx, got ",
    ),
    "hidden parent": (
        rename("vae_decoder.onnx", "a/../../x"),
        "expected a file name inside the bundle that ends in .onnx, got ",
    ),
    "backslash": (
        rename("vae_decoder.onnx", "..\\x.onnx"),
        "expected a file name inside the bundle that ends in .onnx, got ",
    ),
    "drive": (
        rename("vae_decoder.onnx", "C:x.onnx"),
        "expected a file name inside the bundle that ends in .onnx, got ",
    ),
    "reserved name": (rename("vae_decoder.onnx", "aux.onnx"), "expected a file name inside the bundle"),
    "long name": (rename("vae_decoder.onnx", "x" * 300 + ".onnx"), "expected a file name inside the bundle"),
    "endless name": (rename("vae_decoder.onnx", "x/" * 5000 + "x.onnx"), "expected 1 to 1,000 characters, got 10006"),
    "null byte": (rename("vae_decoder.onnx", "x\0.onnx"), "expected printable characters, got 'x\\x00.onnx'"),
    "half a surrogate pair": (rename("vae_decoder.onnx", "\ud800.onnx"), "expected printable characters, got"),
    "names that differ by capitals": (
        lambda content: content["files"].update({"readme.MD": content["files"]["README.md"]}),
        "files: expected names that differ by more than capitals, without bundle.json, got ['README.md', 'readme.MD']",
    ),
    "itself": (
        lambda content: content["files"].update({"bundle.json": content["files"]["README.md"]}),
        "files: expected names that differ by more than capitals, without bundle.json, got ['bundle.json']",
    ),
    "other file outside": (
        lambda content: content["files"].update({"../README.md": content["files"]["README.md"]}),
        "files: expected names relative to the bundle, with '/', that every system can store, got '../README.md'",
    ),
    "file below a file": (rename("vae_decoder.onnx", "README.md/x.onnx"), "README.md/x.onnx is missing"),
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
    assert (manifest.name, manifest.license) == ("tiny", "Apache-2.0")
    assert (manifest.precision, manifest.weights, manifest.vaes) == ("fp32", "fp32", ("kl",))
    assert (manifest.default_height, manifest.default_width, manifest.size_multiple) == (8, 12, 4)
    assert manifest.schedules[2] == Schedule((501, 1), 0.3, (-0.5, 0.25))
    assert (manifest.step_rows(2), manifest.step_rows(4)) == ((1, 3), (0, 1, 2, 3))
    assert manifest.preview == Preview(((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)), (0.625, 0.625, 0.625))
    assert manifest.prompts is not None and manifest.prompts.vocabulary[:2] == ("a", "red")


@pytest.mark.parametrize(
    "name, default", [("vaes", ("kl",)), ("memory", {}), ("sizes", ()), ("preview", None), ("prompts", None)]
)
def test_optional_fields_have_defaults(edit, name, default):
    manifest = Bundle.load(edit(lambda content: content.pop(name, None))).manifest
    assert getattr(manifest, name) == default


def test_refuses_a_directory_without_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: expected a file bundle\.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_a_name_that_no_system_has_is_no_bundle(name):
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.load(name)


def test_verify_names_the_tampered_files(copy):
    bundle = Bundle.load(copy)
    bundle.verify()
    for name in ("vae_decoder.onnx", "README.md"):
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
    Bundle.load(copy)  # Sizes are still right.
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
            vaes=("kl", "tiny"),
            variants={"portable": {**manifest.variants["portable"], "vae_decoder_tiny": "vae_decoder_tiny.onnx"}},
            memory=memory,
            files={},
        ),
    ).manifest
    assert written.graphs == (*GRAPHS, "vae_decoder_tiny") and written.vaes == ("kl", "tiny")
    assert written.memory == memory
    assert memory["portable"]["vae_decoder_tiny"].bytes(rows=3, latents=4) == 3 * (10 * 4 + 2 * 16)


def test_writing_needs_every_file(copy):
    manifest = Bundle.load(copy).manifest
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing; write it before bundle\.json"):
        write_bundle(copy, manifest)


def test_the_manifest_checks_the_exporters_values(tiny):
    content = {**vars(Bundle.load(tiny).manifest), "default_steps": 7}
    with pytest.raises(BundleError, match="default_steps: expected a step count of schedules"):
        Manifest(**content)


def test_committed_bundle_is_format_1(tiny):
    assert json.loads((tiny / "bundle.json").read_text(encoding="utf-8"))["format"] == 1
    Bundle.load(tiny).verify()


HEAD = b'{"format": 1, "name": '
RAW = {
    "half an object": (b"{", "expected JSON"),
    "a list": (b"[]", r"bundle.json: expected an object, got \[\]"),
    "nothing": (b"", "expected JSON"),
    "not UTF-8": (b"\xff", "expected UTF-8, but 'utf-8' codec can't decode"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "without a byte order mark"),
    "UTF-16": ('{"format": 1}'.encode("utf-16"), "expected UTF-8"),
    "deep nesting": (HEAD + b"[" * 200_000, "nested too deeply"),
    "deep objects": (HEAD + b'{"a":' * 200_000, "nested too deeply"),
    "an integer of 5,000 digits": (HEAD + b"1" * 5000 + b"}", "at most 20 digits, got 1111"),
    "a fraction of 400 digits": (b'{"format": 1, "x": ' + b"1" * 400 + b".5}", "expected finite numbers .*, got 1111"),
    "1e999": (HEAD + b"1e999}", "expected finite numbers .*, got 1e999"),
    "NaN": (HEAD + b"NaN}", "expected finite numbers .*, got NaN"),
    "infinity": (HEAD + b"-Infinity}", "expected finite numbers .*, got -Infinity"),
    "a key twice": (b'{"format": 1, "format": 1}', "expected every key once, got 'format' twice"),
    "a key twice, deep": (b'{"files": {"a": {}, "a": {}}}', "expected every key once, got 'a' twice"),
    "a null byte": (b'{"format": 1}\0', "expected JSON"),
    "a list of a million": (b'{"format": 1, "name": [' + b"1," * 10**6 + b"1]}", r"missing field license, .*\.\.\."),
    "a long name": (b'{"format": 1, "' + b"x" * 10**6 + b'": 1}', "missing field"),
    "17 MB": (HEAD + b" " * 17 * 2**20 + b"1}", "expected at most 16,777,216 bytes, got 17,825,816"),
}


@pytest.mark.parametrize("data, message", RAW.values(), ids=RAW)
def test_refuses_other_bytes(copy, data, message):
    (copy / "bundle.json").write_bytes(data)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(copy))


LONG = {
    "a list for a number": put("text_length", [1] * 10**6),
    "a text for a number": put("text_length", "x" * 10**6),
    "text of the wrong kind": put("precision", "x" * 10**6),
    "many unknown fields": lambda content: content.update({f"field{i}": 1 for i in range(10**5)}),
    "a long key": lambda content: content["schedules"].update({"9" * 10**6: {}}),
    "many files": lambda content: content["files"].update(
        {f"{i}": {"sha256": "0" * 64, "size": 0} for i in range(10**5)}
    ),
    "many missing timesteps": put("schedules/2/timesteps", list(range(1000, 0, -1))),
    "a long variant": put("variants", {"x" * 10**6: {}}),
    "a deep list": put("text_length", reduce(lambda inner, _: [inner], range(90), [])),
    "control characters in a key": put("schedules", {"\x1b[2J\n": 1}),
}


@pytest.mark.parametrize("change", LONG.values(), ids=LONG)
def test_messages_are_one_short_line(edit, change):
    directory = edit(change)
    with pytest.raises(BundleError) as caught:
        Bundle.load(directory)
    message = str(caught.value).replace(str(directory), "")
    assert message.isprintable() and len(message) < 500


def in_its_place(path, kind):
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes and devices among files")
@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "loop", "dangling link"])
@pytest.mark.parametrize("name", ["bundle.json", "vae_decoder.onnx"])
def test_only_regular_files_are_read_and_nothing_is_waited_for(copy, name, kind):
    in_its_place(copy / name, kind)
    with pytest.raises(BundleError, match=re.escape(str(copy))) as caught:
        Bundle.load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_manifest(copy):
    (copy / "bundle.json").chmod(0)
    with pytest.raises(BundleError, match="cannot be read: Permission denied"):
        Bundle.load(copy)


def test_links_are_followed(copy, tmp_path):
    """The cache of the Hugging Face Hub has links. The owner of the directory decides on them."""
    for name in ("bundle.json", "vae_decoder.onnx"):
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    Bundle.load(copy).verify()


@pytest.mark.parametrize("name", ["vae_decoder.onnx", "README.md"])
def test_a_graph_that_changes_after_loading_is_noticed(copy, name):
    bundle = Bundle.load(copy)
    bundle.check_graph("vae_decoder")
    data = (copy / name).read_bytes()
    (copy / "other").write_bytes(data)
    (copy / "other").replace(copy / name)  # the same bytes, but another file
    bundle.check_graph("unet_encoder")
    if name == "README.md":  # no graph reads it
        bundle.check_graph("vae_decoder")
    else:
        with pytest.raises(BundleError, match=r"vae_decoder\.onnx changed on disk since the bundle was loaded"):
            bundle.check_graph("vae_decoder")


def test_a_refused_manifest_is_not_written(copy):
    before = (copy / "bundle.json").read_bytes()
    manifest = Bundle.load(copy).manifest
    with pytest.raises(BundleError, match="name: expected 1 to 200 characters"):
        write_bundle(copy, replace(manifest, name=""))
    assert (copy / "bundle.json").read_bytes() == before
    assert not list(copy.glob(".*"))


def test_hidden_files_are_no_part_of_a_bundle(copy):
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    (copy / ".0123456789abcdef.tmp").write_text("left by a writer that was killed")
    assert write_bundle(copy, Bundle.load(copy).manifest) == Bundle.load(copy)


def test_a_safety_checker_is_a_graph_of_every_variant(copy):
    manifest = Bundle.load(copy).manifest
    graphs = {**manifest.variants["portable"], "safety_checker": "safety_checker.onnx"}
    (copy / "safety_checker.onnx").write_bytes((copy / "vae_decoder.onnx").read_bytes())
    how = SafetyChecker(resize=224, crop=224, filter="bicubic")
    changed = replace(manifest, variants={"portable": graphs}, safety_checker=how, files={})
    bundle = write_bundle(copy, changed)
    assert bundle.manifest.graphs[-1] == "safety_checker"
    bundle.verify()
