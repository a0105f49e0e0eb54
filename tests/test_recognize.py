"""Files and folders that people give for a model, and that are something else."""

import pickle
import re
import struct
import zipfile

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from export.source import load_source
from tiue.checkpoint import CheckpointError, load_student
from tiue.components import ComponentsError, load_components


@pytest.fixture
def directory(tmp_path):
    return tiny.save_pipeline(tiny.sd15(), tmp_path / "base")


def zip_of(name):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")

    return write


def cut_short(path):
    save_file({"conv_in.weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])


def cut_in_its_header(path):
    save_file({"conv_in.weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:20])


def text(content):
    return lambda path: path.write_bytes(content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3438167534\n"
FILES = [
    ("model.ckpt", lambda path: torch.save({"state_dict": {}}, path), "is a pickle of PyTorch.*never loaded"),
    ("model.safetensors", lambda path: torch.save({}, path), "is a pickle of PyTorch"),
    ("model.pt", lambda path: path.write_bytes(pickle.dumps({}, protocol=2)), "is a pickle of PyTorch"),
    ("model.pth", zip_of("archive/data.pkl"), "is a pickle of PyTorch"),
    ("model.bin", text(b"\x00\x01\x02"), "is a pickle of PyTorch"),
    ("model.zip", zip_of("model_index.json"), "is a zip archive: unpack it"),
    ("model.safetensors", text(b""), "is empty: download"),
    ("model.safetensors", text(LFS), "is a Git LFS pointer.*git lfs pull"),
    ("model.safetensors", text(b"\n<!DOCTYPE html>\n<html>"), "is a web page"),
    ("model.safetensors", text(b'{"error": "Repository not found"}'), "is a text of JSON"),
    ("model.safetensors", text(bytes(4096)), "holds zeros only"),
    ("model.safetensors", cut_short, "cut short: it has .* bytes: download"),
    ("model.safetensors", cut_in_its_header, "cut short"),
    ("model.safetensors", text(struct.pack("<Q", 8) + b"nonsense"), "is not a safetensors file, or is damaged"),
    ("model.gguf", text(b"GGUF\x03\x00\x00\x00"), "is a GGUF file"),
    ("model.onnx", text(b"\x08\x08\x12\x07pytorch"), "is an ONNX graph"),
    ("model.msgpack", text(b"\x81\xa1a\x01"), "is a file of Flax"),
]


@pytest.mark.parametrize(("name", "write", "message"), FILES, ids=[f"{n} {m}" for n, _, m in FILES])
def test_a_file_of_another_kind_is_named_wherever_it_is_given(directory, tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    for load in (
        lambda: load_source(path),
        lambda: load_source(path, base=directory),
        lambda: load_components(directory, unet_file=path),
        lambda: load_student(path),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load()
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ComponentsError, match=r"is a file.*expected a diffusers pipeline directory"):
        load_components(path)


@pytest.mark.parametrize(("name", "write", "message"), FILES[7:12], ids=[m for _, _, m in FILES[7:12]])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_broken_download_in_a_pipeline_is_named(directory, part, name, write, message):
    (weights,) = (directory / part).glob("*.safetensors")
    write(weights)
    with pytest.raises(ComponentsError, match=rf"{part} cannot be loaded: {weights.name} .*{message}"):
        load_components(directory)


NAMES = {
    "is a LoRA": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
        "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
        "unet.up_blocks.0.attentions.0.processor.to_q_lora.up.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
        "unet.mid_block.attentions.0.to_q.lora.down.weight",
    ],
    "is a ControlNet": ["control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "is an IP-Adapter": ["image_proj.proj.weight"],
    "is a motion module": ["down_blocks.0.motion_modules.0.norm.weight"],
    "is an embedding": ["emb_params"],
    "Stable Diffusion XL": ["conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"],
    "PixArt": ["adaln_single.linear.weight"],
    "a VAE alone": ["decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight", "decoder.layers.0.weight"],
    "a text encoder alone": ["text_model.embeddings.token_embedding.weight", "encoder.block.0.layer.0.norm.weight"],
}


@pytest.mark.parametrize(("message", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_weights_of_another_kind_are_named(directory, tmp_path, message, name):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(2, 2)}, path)
    for base in (None, directory):
        with pytest.raises(ValueError, match=message):
            load_source(path, base=base)
    with pytest.raises(CheckpointError, match=f"not a TiUE student: it .*{message}"):
        load_student(path)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_one_part_of_a_pipeline_is_named(directory, part):
    (weights,) = (directory / part).glob("*.safetensors")
    with pytest.raises(ValueError, match=f"holds a {part.replace('_', ' ').replace('vae', 'VAE')} alone"):
        load_source(weights, base=directory)
    with pytest.raises(ValueError, match="one part of a pipeline: give the folder above"):
        load_source(directory / part)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: (d / "bundle.json").write_text("{}"), "it is a bundle"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "it holds a LoRA"),
        (lambda d: save_file({"x": torch.zeros(1)}, d / "v1-5.safetensors"), r"holds v1-5\.safetensors: give that"),
        (lambda d: (d / "v1-5.ckpt").write_bytes(b"x"), r"holds v1-5\.ckpt, a pickle"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_named(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ComponentsError, match=f"model_index.json is missing; it.*{message.removeprefix('it ')}"):
        load_components(tmp_path)


# Single files in the original layout.


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr("socket.socket.connect", refused)


def without_weights(directory):
    for path in directory.rglob("*.safetensors"):
        path.unlink()
    return directory


HARMLESS = {
    "model_ema.decay": torch.zeros(1),
    "alphas_cumprod": torch.zeros(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
}


def assert_equal(components, expected, parts=("unet", "vae", "text_encoder")):
    for part in parts:
        own, theirs = getattr(components, part).state_dict(), getattr(expected, part).state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_is_read_offline_by_the_configurations_of_its_base(directory, tmp_path, no_network, dtype):
    original, path = tiny.sd15(), tmp_path / "a1111.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in tiny.original_layout(original).items()}
    save_file(tensors | HARMLESS, path)
    student = load_source(path, [4], base=without_weights(directory))
    for part in ("unet", "vae", "text_encoder"):
        for tensor in getattr(original, part).state_dict().values():
            tensor.copy_(tensor.to(dtype))
    assert_equal(student.components, original)
    assert (student.components.name, student.components.license) == ("a1111", "unknown")
    assert not student.declared and student.schedules == {4: [751, 501, 251, 1]}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_in_the_original_layout_takes_the_rest_from_the_base(directory, tmp_path, no_network, prefix):
    expected, path = tiny.with_unet(tiny.unet()), tmp_path / "unet.safetensors"
    for tensor in expected.unet.state_dict().values():
        tensor.add_(1)
    place = "model.diffusion_model."
    tensors = tiny.original_layout(expected)
    save_file({prefix + name.removeprefix(place): t for name, t in tensors.items() if name.startswith(place)}, path)
    assert_equal(load_components(directory, unet_file=path), expected)


def test_a_single_file_alone_is_told_what_it_lacks(tmp_path):
    save_file(tiny.original_layout(tiny.sd15()), tmp_path / "a1111.safetensors")
    with pytest.raises(
        ValueError, match=r"single file in the original layout \(A1111's\).*`base` must name a diffusers"
    ):
        load_source(tmp_path / "a1111.safetensors")
    with pytest.raises(CheckpointError, match="not a TiUE student"):
        load_student(tmp_path / "a1111.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "does not fit"),
        (lambda t: t.pop("first_stage_model.decoder.conv_in.bias"), "does not fit"),
        (lambda t: t.update({"model.diffusion_model.extra.weight": torch.zeros(1)}), "does not fit.*tensors in"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), r"unexpected tensor extra\.weight"),
        (lambda t: t.update({"model.diffusion_model.out.2.scale_weight": torch.ones(1)}), "is quantized.*scale_weight"),
        (
            lambda t: t.update(
                {"cond_stage_model.transformer.text_model.final_layer_norm.weight_scale": torch.ones(1)}
            ),
            "is quantized.*weight_scale",
        ),
        (lambda t: t.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}), "Stable Diffusion XL"),
    ],
)
def test_a_single_file_that_does_not_fit_is_refused(directory, tmp_path, change, message):
    tensors = tiny.original_layout(tiny.sd15())
    change(tensors)
    save_file(tensors, tmp_path / "a1111.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        load_source(tmp_path / "a1111.safetensors", base=directory)
    assert "\n" not in str(refused.value)


# Weights that cannot be used as they are, and names that wrappers changed.


def change_part(directory, part, change):
    (path,) = (directory / part).glob("*.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})


SCALES = [
    "weight_scale",
    "scale_weight",
    "input_scale",
    "weight_scale_inv",
    "weight.SCB",
    "weight.absmax",
    "weight.quant_map",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "zeros",
    "weight.quant_state.bitsandbytes__nf4",
    "scaled_fp8",
    "weight_packed",
    "weight._data",
    "W_q",
]


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_quantized_weights_of_any_part_are_refused_by_name(directory, part, name):
    change_part(directory, part, lambda tensors: tensors | {f"some.layer.{name}": torch.ones(1)})
    with pytest.raises(
        ComponentsError, match=f"{part} cannot be loaded: is quantized: it has some.layer.{name} .*take"
    ):
        load_components(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_integers_in_the_place_of_weights_are_refused(directory, part, dtype):
    def quantize(tensors):
        first = min(name for name in tensors if name.endswith("weight"))
        return tensors | {first: tensors[first].to(dtype)}

    change_part(directory, part, quantize)
    with pytest.raises(ComponentsError, match=f"{part} cannot be loaded: stores .*weight as [IU]"):
        load_components(directory)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_quantization_in_the_configuration_is_refused(directory, part):
    tiny.edit_json(directory / part / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ComponentsError, match=f"{part} is quantized .*bitsandbytes.*expected weights in float32"):
        load_components(directory)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_were_rounded_to_eight_bits_without_scales_are_read(directory, part):
    change_part(directory, part, lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
    loaded = getattr(load_components(directory), part).state_dict()
    for name, tensor in getattr(tiny.sd15(), part).state_dict().items():
        assert torch.equal(loaded[name], tensor.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["extra", "text_model.extra.weight", "adapter.weight"])
def test_an_unexpected_tensor_of_a_text_encoder_is_refused(directory, name):
    change_part(directory, "text_encoder", lambda tensors: tensors | {name: torch.zeros(1)})
    with pytest.raises(ComponentsError, match=f"unexpected tensor {re.escape(name)}"):
        load_components(directory)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "text_model.embeddings.position_ids"),
        ("text_encoder", "text_projection.weight"),
        ("text_encoder", "logit_scale"),
        ("text_encoder", "vision_model.embeddings.class_embedding"),
    ],
)
def test_tensors_that_no_picture_depends_on_are_left_out(directory, part, name):
    change_part(directory, part, lambda tensors: tensors | {name: torch.zeros(1)})
    assert_equal(load_components(directory), tiny.sd15())


PREFIXES = [
    "_orig_mod.",
    "module.",
    "_fsdp_wrapped_module.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "ema.",
    "student.",
    "net._orig_mod.",
    "base_model.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_prefixes_of_wrapped_models_are_taken_off_with_a_warning(directory, part, prefix):
    change_part(directory, part, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    with pytest.warns(UserWarning, match=f"{part}: removed the prefix"):
        assert_equal(load_components(directory), tiny.sd15())


@pytest.mark.parametrize("prefix", [*PREFIXES, "unet._orig_mod.", "unet.module.", "model.unet."])
def test_prefixes_of_a_unets_file_are_taken_off_with_a_warning(directory, tmp_path, prefix):
    save_file({prefix + n: t for n, t in tiny.unet().state_dict().items()}, tmp_path / "unet.safetensors")
    with pytest.warns(UserWarning, match="removed the prefix"):
        student = load_source(tmp_path / "unet.safetensors", base=directory)
    assert_equal(student.components, tiny.sd15())


def test_prefixes_within_names_are_taken_off(directory):
    def wrap(tensors):
        return {name.replace("down_blocks.0.", "down_blocks.0._orig_mod."): t for name, t in tensors.items()}

    change_part(directory, "unet", wrap)
    with pytest.warns(UserWarning, match=r"removed the prefix _orig_mod\."):
        assert_equal(load_components(directory), tiny.sd15())


def test_two_sets_of_weights_are_ambiguous(directory):
    change_part(directory, "unet", lambda t: t | {f"_orig_mod.{n}": tensor.clone() for n, tensor in t.items()})
    with pytest.raises(ComponentsError, match=r"is ambiguous: .*keep one"):
        load_components(directory)


def test_weights_and_their_average_in_one_file_are_ambiguous(directory, tmp_path):
    weights = tiny.unet().state_dict()
    both = {f"{prefix}.{n}": t.clone() for prefix in ("model", "ema") for n, t in weights.items()}
    save_file(both, tmp_path / "unet.safetensors")
    with pytest.raises(ComponentsError, match=r"unexpected tensor ema\.conv_in"):
        load_source(tmp_path / "unet.safetensors", base=directory)


# Model cards.


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (b"\xff\xfe\x00bad", "unknown"),
        (b"---\nlicense: mit\n---\n\xff\xfe", "mit"),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", "mit"),
        (b"---\nlicense: 'apache-2.0'  # see LICENSE\n---\n", "apache-2.0"),
        (b"---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        (b"---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        (b"---\ntags: [x\n  : {{ odd\nlicense: mit\n---\n", "mit"),
        (b"---\ntags: x\n---\nlicense: not declared\n", "unknown"),
        (b"---\nlicense:\n---\n", "unknown"),
        (b"---\nlicense: mit\n---\n" + b"x" * 10**7, "mit"),
        (b"---\nlicense: " + b"x" * 10**6 + b"\n---\n", "unknown"),
        (b"", "unknown"),
    ],
)
def test_a_model_card_never_stops_a_load(directory, card, expected):
    (directory / "README.md").write_bytes(card)
    assert load_components(directory).license == expected


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"[]", b'{"unet": [1, 2]}'])
def test_a_malformed_index_is_refused_in_one_line(directory, content):
    (directory / "model_index.json").write_bytes(content)
    with pytest.raises(ComponentsError) as refused:
        load_components(directory)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
