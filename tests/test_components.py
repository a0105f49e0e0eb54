import inspect
import json
import warnings

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, CLIPTokenizerFast

from export.source import load_source
from tiue import schedule
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import ComponentsError, Geometry, decode_latents, load_components, load_tiny_vae
from tiue.files import OneLineError
from tiue.schedule import ddim_timesteps
from tiue.text_encoder import encode_text, tokenize


@pytest.fixture
def directory(tmp_path):
    return tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")


@pytest.mark.parametrize("make", [tiny.sd15, tiny.emoji])
@torch.no_grad()
def test_a_pipeline_directory_is_read_back(make, tmp_path):
    original = make()
    (tiny.save_pipeline(original, tmp_path) / "README.md").write_text(
        "---\nlicense: Apache-2.0 AND MIT \n---\n# Tiny\n"
    )
    loaded = load_components(tmp_path)
    assert (loaded.name, loaded.license) == (tmp_path.name, "Apache-2.0 AND MIT")
    prompts = ["a cat", ""]
    assert torch.equal(encode_text(loaded, prompts), encode_text(original, prompts))
    for part in ("unet", "vae"):
        a, b = getattr(loaded, part).state_dict(), getattr(original, part).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_models_geometry_is_read_from_its_configurations():
    assert tiny.sd15().geometry == Geometry(channels=4, height=8, width=8, pixels_per_latent=2, multiple=4)
    assert tiny.with_unet(tiny.unet(sample_size=(8, 16))).geometry.latent_shape == (4, 8, 16)
    with pytest.raises(ComponentsError, match="no sample_size"):
        _ = tiny.with_unet(tiny.unet(sample_size=None)).geometry


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5, 0.25)])
@torch.no_grad()
def test_latents_are_decoded_with_the_vaes_scale_and_shift(scale, shift):
    vae, z = tiny.sd15().vae, torch.randn(2, 4, 4, 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    assert torch.equal(decode_latents(vae, z), vae.decode(z / scale + (shift or 0)).sample)
    tiny_vae = tiny.taesd()
    assert torch.equal(decode_latents(tiny_vae, z), tiny_vae.decode(z).sample)


def test_a_models_scheduler_is_built_once(directory, monkeypatch):
    tiny.edit_json(directory / "scheduler" / "scheduler_config.json", beta_end=0.0123)  # no other test has read it
    built, original = [], schedule.DDIMScheduler

    def count(**options):
        built.append(options)
        return original(**options)

    monkeypatch.setattr(schedule, "DDIMScheduler", count)
    monkeypatch.setattr(schedule, "signature", lambda _: inspect.signature(original.__init__))
    components = load_components(directory)
    Student(components, 751, {4: [751, 501, 251, 1]}).tiue()
    assert components.noise_schedule.timesteps(4) == [751, 501, 251, 1]
    assert len(built) == 1


@torch.no_grad()
def test_the_mask_is_used_where_the_text_encoder_asks_for_it():
    assert tokenize(tiny.sd15(), ["a cat"])[1] is None
    components = tiny.emoji()
    ids, mask = tokenize(components, ["a cat", "x" * 100])
    assert ids.shape == mask.shape == (2, 32)
    assert mask.sum(1).tolist() == [7, 32]
    unmasked = components.text_encoder(input_ids=ids)[0]
    assert not torch.allclose(encode_text(components, ["a cat", "x" * 100])[0], unmasked[0])


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(directory, part):
    (directory / part).rename(directory / "elsewhere")
    with pytest.raises(ComponentsError, match=rf"not a complete diffusers pipeline: {part}"):
        load_components(directory)


def test_an_unnamed_or_unsupported_part_is_named(directory):
    index = json.loads((directory / "model_index.json").read_text())
    for part, value, message in (
        ("vae", [None, None], "names no vae"),
        (
            "vae",
            ["diffusers", "VQModel"],
            "VQModel is not supported: expected AutoencoderKL or AutoencoderTiny",
        ),
        ("text_encoder", ["os", "system"], "system is not supported"),
    ):
        (directory / "model_index.json").write_text(json.dumps(index | {part: value}))
        with pytest.raises(ComponentsError, match=message):
            load_components(directory)


@pytest.mark.parametrize(("option", "value"), [("addition_embed_type", "text_time"), ("num_class_embeds", 10)])
def test_an_unsupported_unet_is_refused_before_its_weights_are_read(directory, option, value):
    path = directory / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    weights_of(directory / "unet").unlink()
    with pytest.raises(ComponentsError, match=f"unet: UNet option {option}={value!r} is not supported"):
        load_components(directory)


def weights_of(directory):
    (path,) = (p for p in directory.iterdir() if p.suffix == ".safetensors")
    return path


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickles_are_not_read(directory, part):
    weights = weights_of(directory / part)
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ComponentsError, match=rf"{part} cannot be loaded.*found: {weights.stem}\.bin, a pickle"):
        load_components(directory)


def fp16(directory):
    for part in ("unet", "text_encoder", "vae"):
        path = weights_of(directory / part)
        save_file({name: t.half() for name, t in load_file(path).items()}, path, {"format": "pt"})
        path.rename(path.with_suffix(".fp16.safetensors"))


def sharded(directory, variant=None):
    loaded = load_components(directory)
    for part, size in (("unet", "60KB"), ("text_encoder", "10KB")):
        weights_of(directory / part).unlink()
        getattr(loaded, part).save_pretrained(directory / part, max_shard_size=size, variant=variant)
        assert len(list((directory / part).glob("*-of-*.safetensors"))) > 1


def fp16_shards(directory):
    sharded(directory, variant="fp16")


@pytest.mark.parametrize("layout", [fp16, sharded, fp16_shards])
def test_every_layout_of_weights(directory, layout):
    layout(directory)
    loaded, original = load_components(directory), tiny.sd15()
    for part in ("unet", "text_encoder", "vae"):
        for name, tensor in getattr(original, part).state_dict().items():
            expected = tensor.half().float() if layout is fp16 else tensor
            assert torch.equal(getattr(loaded, part).state_dict()[name], expected)


def test_weights_in_full_are_preferred_to_fp16(directory):
    full = weights_of(directory / "unet")
    save_file({"other": torch.zeros(1)}, full.with_suffix(".fp16.safetensors"))
    assert torch.equal(load_components(directory).unet.conv_in.weight, load_file(full)["conv_in.weight"])


@torch.no_grad()
def test_the_original_layout_of_sd15(tmp_path):
    original = tiny.save_original_sd15(tmp_path)
    with pytest.warns(UserWarning, match="safety_checker is left out"):
        loaded = load_components(tmp_path)
    for part in ("unet", "text_encoder", "vae"):
        own, expected = getattr(loaded, part).state_dict(), getattr(original, part).state_dict()
        assert own.keys() == expected.keys()
        for name, tensor in expected.items():
            assert own[name].dtype == torch.float32
            assert torch.equal(own[name], tensor.half().float())
    assert loaded.vae.config.scaling_factor == 0.18215
    assert loaded.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 8
    assert ddim_timesteps(loaded.scheduler_config, 4) == [751, 501, 251, 1]
    ids, mask = tokenize(loaded, ["cat"])
    assert ids.tolist() == [[515, 513, *[516] * 18]]
    assert mask is None
    assert encode_text(loaded, ["cat"]).dtype == torch.float32


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"], ids=["sd15", "sd21"])
def test_the_slow_tokenizers_files_give_its_ids(directory, pad):
    tiny.save_clip_tokenizer(directory / "tokenizer", pad)
    tiny.edit_json(directory / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    tokenizer = load_components(directory).tokenizer
    slow = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    assert isinstance(tokenizer, CLIPTokenizerFast)
    assert (tokenizer.model_max_length, tokenizer.pad_token) == (20, pad)
    prompts = ["A cat, at!", "", "cat !! ", "naïve café 猫", "long " * 100]
    options = {"padding": "max_length", "truncation": True, "max_length": 20}
    assert tokenizer(prompts, **options).input_ids == slow(prompts, **options).input_ids


def test_a_tokenizer_without_settings_is_as_long_as_the_text_encoder(directory):
    tiny.save_clip_tokenizer(directory / "tokenizer", pad="", settings=False)
    tiny.edit_json(directory / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
    components = load_components(directory)
    assert components.tokenizer.pad_token == "<|endoftext|>"
    assert tokenize(components, ["cat"])[0].tolist() == [[515, 513, *[516] * 22]]


def lacks_a_tensor(tensors):
    del tensors[min(tensors)]


def has_another(tensors):
    tensors["extra"] = torch.zeros(1)


def misshapen(tensors):
    tensors[min(tensors)] = torch.zeros(3)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacks_a_tensor, r"lacks tensor {} \(1 in all\)"),
        (has_another, r"an unexpected tensor extra \(1 in all\)"),
        (misshapen, "{}"),
    ],
)
def test_weights_that_are_not_the_models(directory, part, damage, message, caplog):
    path = weights_of(directory / part)
    tensors = load_file(path)
    first = min(tensors)
    damage(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ComponentsError, match=f"{part} cannot be loaded.*{message.format(first)}") as error:
        load_components(directory)
    assert "\n" not in str(error.value)
    assert not caplog.records  # nor do the libraries say it in their words


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_damaged_file(directory, part):
    path = weights_of(directory / part)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ComponentsError, match=f"{part} cannot be loaded"):
        load_components(directory)


def test_a_missing_shard(directory):
    sharded(directory)
    next((directory / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(ComponentsError, match="unet cannot be loaded"):
        load_components(directory)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "transformer"),
    ],
)
def test_other_families_are_refused_by_name(directory, name, parts, message):
    tiny.edit_json(directory / "model_index.json", _class_name=name, **parts)
    with pytest.raises(ComponentsError, match=f"{name} is not supported.*it has {message}"):
        load_components(directory)


def test_thresholding_is_left_out_with_a_warning_and_other_processes_are_refused(directory):
    path = directory / "scheduler" / "scheduler_config.json"
    tiny.edit_json(path, thresholding=True)
    with pytest.warns(UserWarning, match="scheduler sets thresholding, left out"):
        assert load_components(directory).scheduler_config["thresholding"]
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(ComponentsError, match="scheduler: FlowMatchEulerDiscreteScheduler has no DDIM"):
        load_components(directory)


# Configurations of 2022, which diffusers' pipelines repair when they are made.

SD2022 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
}
DDIM = SD2022 | {"_class_name": "DDIMScheduler"}


def as_diffusers_saves_it(directory, scheduler):
    """A pipeline directory that diffusers can read, too, with a scheduler's configuration."""
    tiny.save_clip_tokenizer(directory / "tokenizer", "<|endoftext|>")
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    tiny.edit_json(
        directory / "model_index.json",
        scheduler=["diffusers", scheduler["_class_name"]],
        tokenizer=["transformers", "CLIPTokenizer"],
        safety_checker=[None, None],
        feature_extractor=[None, None],
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("scheduler", "repairs"),
    [
        (DDIM | {"steps_offset": 0, "clip_sample": False}, ["steps_offset 0"]),
        (DDIM | {"clip_sample": False}, ["steps_offset 0"]),
        (DDIM | {"steps_offset": 1, "clip_sample": True}, ["clip_sample, true"]),
        (DDIM | {"steps_offset": 1}, ["clip_sample, missing"]),
        (DDIM, ["steps_offset 0", "clip_sample, missing"]),
        (DDIM | {"steps_offset": 2, "clip_sample": False, "set_alpha_to_one": False}, ["steps_offset 2"]),
        (SD2022 | {"skip_prk_steps": True}, ["steps_offset 0"]),
        (SD2022 | {"steps_offset": 1, "set_alpha_to_one": False}, []),
        (SD2022 | {"_class_name": "DDPMScheduler"}, ["steps_offset 0", "clip_sample, missing"]),
        (SD2022 | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, ["steps_offset 0"]),
        (SD2022 | {"_class_name": "LMSDiscreteScheduler", "steps_offset": 1}, []),
    ],
)
def test_timesteps_are_those_of_diffusers_pipeline_which_repairs_configurations(directory, scheduler, repairs):
    as_diffusers_saves_it(directory, scheduler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        components = load_components(directory)
    said = [str(warning.message) for warning in said]
    assert len(said) == len(repairs)
    assert all(
        repair in message and "as in diffusers" in message for repair, message in zip(repairs, said, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repaired = StableDiffusionPipeline.from_pretrained(directory, local_files_only=True).scheduler.config
    own = components.scheduler_config
    for option in ("steps_offset", "clip_sample"):
        if option in repaired:
            assert own.get(option, repaired[option]) == repaired[option]
    defaults = {"_use_default_values", *repaired.get("_use_default_values", [])}  # in their place, DDIM has its own
    kept = {*repaired} - defaults | {"steps_offset"}
    expected = DDIMScheduler.from_config({name: value for name, value in repaired.items() if name in kept})
    for steps in (1, 4, 7):
        expected.set_timesteps(steps)
        assert components.noise_schedule.timesteps(steps) == expected.timesteps.tolist()


def test_a_repaired_scheduler_is_not_repaired_again_in_a_student(directory, tmp_path):
    as_diffusers_saves_it(directory, DDIM)
    with pytest.warns(UserWarning, match="as in diffusers"):
        components = load_components(directory)
    save_student(tmp_path / "student.safetensors", Student(components, 751, {4: [751, 501, 251, 1]}))
    assert load_student(tmp_path / "student.safetensors").components.scheduler_config == components.scheduler_config


def test_pipelines_that_diffusers_does_not_repair_stay_as_they_are(directory):
    as_diffusers_saves_it(directory, DDIM | {"steps_offset": 0, "clip_sample": False})
    tiny.edit_json(directory / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert load_components(directory).noise_schedule.timesteps(4) == [750, 500, 250, 0]


@pytest.mark.parametrize(("version", "size"), [("0.8.1", 64), ("0.2.2", 64), ("0.9.0", 8), (None, 8), ("odd", 8)])
def test_the_size_of_unets_from_before_diffusers_0_9_is_repaired(directory, version, size):
    tiny.edit_json(directory / "unet" / "config.json", _diffusers_version=version)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        components = load_components(directory)
    assert components.geometry.latent_shape == (4, size, size)
    assert len(said) == (size == 64) and all("sample_size 8" in str(warning.message) for warning in said)


def test_no_directory_is_not_taken_for_a_hub_id():
    with pytest.raises(ComponentsError, match="no such pipeline directory: some/model"):
        load_components("some/model")


# Configurations that make no sense.


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"sample_size": 8.5}, "sample_size is 8.5: expected a whole number, or two"),
        ("unet", {"sample_size": [8]}, r"sample_size is \[8\]"),
        ("unet", {"sample_size": "8"}, "sample_size is '8'"),
        ("unet", {"sample_size": 0}, "sample_size is 0"),
        ("unet", {"sample_size": [8, -8]}, "sample_size is"),
        ("unet", {"sample_size": True}, "sample_size is True"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block is 1000000: expected at most"),
        ("unet", {"norm_num_groups": 0}, "unet cannot be loaded as UNet2DConditionModel"),
        ("vae", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ("text_encoder", {"vocab_size": 2**40}, "vocab_size is"),
    ],
)
@pytest.mark.parametrize("base", [False, True])
def test_configurations_that_make_no_sense_are_refused_at_once(directory, tmp_path, part, changes, message, base):
    tiny.edit_json(directory / part / "config.json", **changes)
    source, rest = directory, None
    if base:
        source, rest = tmp_path / "unet.safetensors", directory
        save_file(tiny.unet().state_dict(), source)
    with pytest.raises(ValueError, match=message) as refused:
        load_source(source, base=rest)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("length", ["<|endoftext|>", [77], {}, 77.5, 0, -1, True])
def test_a_length_that_is_no_number_is_refused(directory, length):
    tiny.edit_json(directory / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ValueError, match=r"model_max_length is .*: expected a whole number"):
        load_source(directory)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "x/" * 3000, "x" * 300 + ".safetensors", "a\0b"])
def test_names_that_no_system_has_are_no_files(name):
    for load in (load_source, load_components, load_tiny_vae, load_student):
        with pytest.raises(OneLineError, match=r"no such (checkpoint|pipeline directory|directory)"):
            load(name)
