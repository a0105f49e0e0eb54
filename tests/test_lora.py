"""LoRA files in every layout, merged before an export: W + scale * alpha / rank * B A, or one clear refusal."""

import hashlib
import math
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tolerances import REORDERED
from torch import nn

from export import assemble
from export.errors import ExportError
from export.export_options import Options
from export.lora import Lora, merge_lora, parse_lora
from export.onnx import main
from export.plan import make_plan

PARTS = ("unet", "text_encoder")
LAYERS = {part: [n for n, m in getattr(tiny.sd15(), part).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
          for part in PARTS}  # fmt: skip
ATTENTION = r".*(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)"
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def factors(parts=PARTS):
    """Return (part, layer) => (A, B, alpha) for every layer of a model, of several ranks and alphas."""
    made = {}
    for part in parts:
        modules = dict(getattr(tiny.sd15(), part).named_modules())
        torch.manual_seed(5)
        for i, layer in enumerate(LAYERS[part]):
            weight = modules[layer].weight
            r = 1 + i % 3
            down = 0.1 * torch.randn(r, *weight.shape[1:])
            up = 0.1 * torch.randn(len(weight), r, *[1] * (weight.ndim - 2))
            made[part, layer] = down, up, 0.5 + i % 4
    return made


def kohya(made):
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    tensors = {}
    for (part, layer), (down, up, alpha) in made.items():
        name = prefixes[part] + layer.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def named(made, down_name, up_name):
    """Return the factors under names made of {part} and {layer}."""
    tensors = {}
    for (part, layer), (down, up, _) in made.items():
        tensors |= {down_name.format(part=part, layer=layer): down, up_name.format(part=part, layer=layer): up}
    return tensors


def assert_merged(components, made, strength):
    """Every layer has its closed form, and every other weight is as it was."""
    original = tiny.sd15()
    for part in PARTS:
        before = getattr(original, part).state_dict()
        for name, after in getattr(components, part).state_dict().items():
            expected = before[name].clone()
            found = made.get((part, name.removesuffix(".weight")))
            if found is not None and name.endswith(".weight"):
                down, up, alpha = found
                product = up.double().flatten(1) @ down.double().flatten(1)
                expected += (strength * alpha / len(down) * product).reshape(after.shape).float()
                assert not torch.equal(after, before[name])
            torch.testing.assert_close(after, expected, rtol=0, atol=REORDERED)


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_kohya_with_an_alpha_for_every_layer(tmp_path, strength):
    made, components = factors(), tiny.sd15()
    save_file(kohya(made), tmp_path / "style.safetensors")
    merged = merge_lora(components, Lora(tmp_path / "style.safetensors", strength))
    assert_merged(components, made, strength)
    digest = hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    assert str(merged) == f"style.safetensors, scale {strength:g}, sha256 {digest}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kohya_in_half_precision_without_alphas(tmp_path, dtype):
    made = {key: (down.to(dtype).float(), up.to(dtype).float(), len(down)) for key, (down, up, _) in factors().items()}
    tensors = {name: t.to(dtype) for name, t in kohya(made).items() if not name.endswith("alpha")}
    save_file(tensors, tmp_path / "style.safetensors")
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "style.safetensors"))
    assert_merged(components, made, 1)


def test_matrices_change_1x1_convolutions(tmp_path):
    """Trainers write the factors of `proj_in` as matrices or as convolutions, whatever the model has."""
    made = {key: value for key, value in factors().items() if key[1].endswith(("proj_in", "proj_out"))}
    tensors = {name: t.flatten(1) if t.ndim == 4 else t for name, t in kohya(made).items()}
    save_file(tensors, tmp_path / "style.safetensors")
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "style.safetensors"))
    assert made
    assert_merged(components, made, 1)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("{part}.{layer}.lora_A.weight", "{part}.{layer}.lora_B.weight"),
        ("{part}.{layer}.lora_A.default.weight", "{part}.{layer}.lora_B.default.weight"),
        ("{part}.{layer}.lora.down.weight", "{part}.{layer}.lora.up.weight"),
        ("{part}.{layer}.lora_linear_layer.down.weight", "{part}.{layer}.lora_linear_layer.up.weight"),
    ],
)
def test_diffusers_without_alphas(tmp_path, down, up):
    made = {key: (*value[:2], len(value[0])) for key, value in factors().items()}
    save_file(named(made, down, up), tmp_path / "style.safetensors")
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "style.safetensors", 0.5))
    assert_merged(components, made, 0.5)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_diffusers_of_2022(tmp_path, prefix):
    made = {key: (*value[:2], len(value[0])) for key, value in factors().items() if ".attn" in key[1]}
    text = {k: (*v[:2], len(v[0])) for k, v in factors().items() if "self_attn" in k[1]} if prefix else {}
    tensors = {}
    for (part, layer), (a, b, _) in {**made, **text}.items():
        if part == "unet":
            head, _, leaf = layer.removesuffix(".0").rpartition(".")
            name = f"{prefix}{head}.processor.{leaf}"
        else:
            name = f"text_encoder.{layer.replace('_proj', '').replace('self_attn.', 'self_attn.to_')}"
        tensors |= {f"{name}_lora.down.weight": a, f"{name}_lora.up.weight": b}
    save_file(tensors, tmp_path / "style.safetensors")
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "style.safetensors"))
    assert_merged(components, {**made, **text}, 1)


# Files that the libraries themselves write.


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_own_file_with_its_metadata(tmp_path, rslora):
    """Its alphas are in the metadata, one for most layers and others by pattern."""
    trained = tiny.sd15()
    layers, metadata = {}, {}
    for part, others in zip(PARTS, ({"to_q": 3}, {"self_attn.v_proj": 1}), strict=True):
        module = getattr(trained, part)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, use_rslora=rslora, alpha_pattern=others)
        module.add_adapter(config, adapter_name="style")
        layers[part] = random_adapter(module, get_peft_model_state_dict(module, adapter_name="style"))
        metadata[part] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        layers["unet"],
        layers["text_encoder"],
        weight_name="style.safetensors",
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"],
    )
    made = {}
    for part in PARTS:
        for name, down in layers[part].items():
            if name.endswith("lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                alpha = 3 if layer.endswith("to_q") else 1 if layer.endswith("v_proj") else 6
                made[part, layer] = down, layers[part][f"{layer}.lora_B.weight"], alpha * (2 if rslora else 1)
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "style.safetensors", 0.5))
    assert_merged(components, made, 0.5)


def random_adapter(module, state):
    """Return the factors with random values. peft begins with B = 0."""
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


def test_pefts_own_directory(tmp_path):
    """Its alpha is in the configuration beside the file. The merged weights are those that peft merges."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=ATTENTION, init_lora_weights=False)
    torch.manual_seed(4)
    model = get_peft_model(tiny.unet(), config)
    model.save_pretrained(tmp_path)
    components = tiny.sd15()
    merge_lora(components, Lora(tmp_path / "adapter_model.safetensors"))
    expected = model.merge_and_unload().state_dict()
    assert not torch.equal(expected[f"{TO_Q}.weight"], tiny.unet().state_dict()[f"{TO_Q}.weight"])
    for name, tensor in components.unet.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=REORDERED)

    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path / "adapter_model.safetensors", "adapter_config.json, which has its alpha, must lie beside it")


def test_several_add_up(tmp_path):
    made, components = factors(), tiny.sd15()
    save_file(kohya(made), tmp_path / "a.safetensors")
    for scale in (0.25, 0.5):
        merge_lora(components, Lora(tmp_path / "a.safetensors", scale))
    assert_merged(components, made, 0.75)


# Refusals. No weight changes.


def refused(path, message):
    components = tiny.sd15()
    with pytest.raises(ExportError, match=message):
        merge_lora(components, Lora(path))
    assert_merged(components, {}, 1)


def one(part="unet", layer=TO_Q, **changes):
    """Return one pair in kohya's layout, with some tensors replaced, or with None removed."""
    (down, up, alpha) = factors()[part, layer]
    name = "lora_unet_" + layer.replace(".", "_")
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    return {f"{name}.{key}": tensor for key, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (one(lora_up__weight=None), r"lora_down\.weight would not be used: the pair is not complete"),
        (one(lora_down__weight=None), r"lora_up\.weight would not be used: the pair is not complete"),
        (one(lora_down__weight=None, lora_up__weight=None), "is a LoRA|is not a LoRA"),
        (one(lora_down__weight=torch.ones(3, 16)), r"attn1_to_q\.lora_down\.weight \[3, 16\].*\[16, 2\] do not fit"),
        (one(lora_down__weight=torch.ones(2, 24)), r"weight \[2, 24\].*\[16, 24\], but unet\..*to_q has \[16, 16\]"),
        (one(lora_up__weight=torch.ones(20, 2)), r"another model.*lora_up\.weight \[20, 2\].*\[20, 16\]"),
        (one(lora_down__weight=torch.ones(2, 16, 3, 3)), r"\[16, 16, 3, 3\], but .* has \[16, 16\]"),
        (one(lora_down__weight=torch.ones(0, 16), lora_up__weight=torch.ones(16, 0)), "do not fit each other"),
        (one(lora_down__weight=torch.tensor(1.0)), "do not fit each other"),
        (one(lora_down__weight=torch.full((1, 16), math.nan)), r"lora_down\.weight holds infinity or NaN"),
        (one(alpha=torch.tensor(math.inf)), r"alpha holds infinity or NaN"),
        (one(alpha=torch.ones(2)), r"alpha has the shape \[2\]: expected one number"),
        (one(lora_down__weight=torch.ones(1, 16, dtype=torch.int8)), r"as torch\.int8: expected float32"),
        (one(lora_mid__weight=torch.ones(1, 1, 3, 3)), "is a LoCon with a third factor, which is not supported"),
        (one(dora_scale=torch.ones(16)), "is a DoRA, which is not supported"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is a LoHa, which is not supported"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "is a LoKr, which is not supported"),
        ({**one(), "lora_te2_text_model_fc1.alpha": torch.ones(1)}, "is a LoRA of Stable Diffusion XL"),
        ({**one(), "first": torch.ones(1), "second": torch.ones(1)}, "first, second would not be used"),
        ({f"t{i}": torch.ones(1) for i in range(9)} | one(), "t0, t1, t2 and 6 more would not be used"),
        ({"unet.up.lora_A.weight": torch.ones(1, 2), "unet.up.lora_B.weight": torch.ones(2, 1)}, "no such layers"),
        ({name.replace("lora_unet", "lora_te"): t for name, t in one().items()}, "the model has no such layers"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "is not a LoRA"),
        ({"control_model.input_blocks.0.0.weight": torch.ones(1)}, "is a ControlNet"),
        ({}, "is not a LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "style.safetensors")
    refused(tmp_path / "style.safetensors", message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "its metadata is not valid JSON"),
        ("[1]", "its metadata must hold a JSON object"),
        ('{"unet.lora_alpha": "many"}', "lora_alpha 'many'"),
        ('{"unet.lora_alpha": 1e999}', "lora_alpha inf"),
        ('{"unet.alpha_pattern": 3}', "alpha_pattern 3"),
    ],
)
def test_metadata_that_make_no_sense(tmp_path, metadata, message):
    tensors = {f"unet.{TO_Q}.lora_A.weight": torch.ones(1, 16), f"unet.{TO_Q}.lora_B.weight": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": metadata})
    refused(tmp_path / "style.safetensors", message)


def test_files_of_other_kinds(tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"")
    refused(tmp_path / "style.safetensors", "is empty: download or copy it again")
    torch.save(kohya(factors()), tmp_path / "style.ckpt")
    refused(tmp_path / "style.ckpt", "is a pickle of PyTorch, which can run programs and is never loaded")
    (tmp_path / "style.ckpt").rename(tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", "is a pickle of PyTorch")
    refused(tmp_path, "is a directory: expected the .safetensors file of a LoRA in it")
    refused(tmp_path / "absent.safetensors", "no such LoRA")


# The command.


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1),
        (r"C:\loras\style.safetensors:0.5", r"C:\loras\style.safetensors", 0.5),
        ("C:style.safetensors", "C:style.safetensors", 1),
        ("a:b/style.safetensors:2", "a:b/style.safetensors", 2),
    ],
)
def test_file_and_scale(text, path, scale):
    assert parse_lora(text) == Lora(Path(path), scale)


def test_a_file_with_a_colon_and_a_number_in_its_name(tmp_path):
    path = tmp_path / "style:0.5"
    path.touch()
    assert parse_lora(str(path)) == Lora(path, 1)
    assert parse_lora(f"{path}:2") == Lora(path, 2)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e999", "", "strong", "0,5"])
def test_a_scale_that_is_no_finite_number(scale):
    with pytest.raises(ExportError, match=r"`lora` must be FILE or FILE:SCALE with a finite number"):
        parse_lora(f"style.safetensors:{scale}")


def test_the_command_merges_and_records(tmp_path, monkeypatch, capsys):
    exported = []
    monkeypatch.setattr(assemble, "export_bundle", lambda student, *_: exported.append(student))
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "base")
    first, second = tmp_path / "a, style.safetensors", tmp_path / "b.safetensors"
    save_file(kohya(factors(parts=["unet"])), first)
    save_file(kohya(factors(parts=["text_encoder"])), second)
    flags = ["--lora", f"{first}:0.5", "--lora", str(second), "--lora", f"{second}:-0.5"]
    assert main(["--ckpt", str(directory), *flags]) == 0
    assert "whether those of the LoRAs allow" in capsys.readouterr().err
    (student,) = exported
    assert_merged(student.components, factors(), 0.5)
    manifest = make_plan(student, Options()).manifest
    sha = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    assert manifest.created_from["lora_1"] == f"a, style.safetensors, scale 0.5, sha256 {sha[0]}"
    assert manifest.created_from["lora_3"] == f"b.safetensors, scale -0.5, sha256 {sha[1]}"


def test_without_loras_nothing_is_merged_or_said(tmp_path, monkeypatch, capsys):
    exported = []
    monkeypatch.setattr(assemble, "export_bundle", lambda student, *_: exported.append(student))
    assert main(["--ckpt", str(tiny.save_pipeline(tiny.sd15(), tmp_path / "base"))]) == 0
    assert_merged(exported[0].components, {}, 1)
    assert not any(key.startswith("lora") for key in make_plan(exported[0], Options()).manifest.created_from)
    assert "LoRA" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [("style.safetensors:nan", "--lora must be FILE or FILE:SCALE"), ("absent.safetensors", "no such LoRA: absent")],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, flag, message):
    monkeypatch.setattr(assemble, "export_bundle", None)
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "base")
    assert main(["--ckpt", str(directory), "--out", str(tmp_path / "out"), "--lora", flag]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("export.onnx: error: ") and message in last


def test_a_lora_in_place_of_the_model_names_the_flag(tmp_path, capsys):
    save_file(kohya(factors()), tmp_path / "style.safetensors")
    assert main(["--ckpt", str(tmp_path / "style.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "is a LoRA (changes to a model, not a model): export its model, and name this file in --lora" in (
        capsys.readouterr().err
    )
    assert load_file(tmp_path / "style.safetensors").keys() == kohya(factors()).keys()
