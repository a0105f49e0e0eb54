import json
from dataclasses import replace

import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import SCHEDULES
from tiue_runtime import bundle
from tolerances import REORDERED
from torch import nn
from transformers import T5Config, T5EncoderModel

from export.trace_text import text_encoder_graph
from tiue.checkpoint import CheckpointError, Student, check_savable, load_student, save_student
from tiue.text_encoder import encode_text, tokenize

PARTS = ("unet", "text_encoder", "vae")


def student(components):
    schedules = {4: [751, 501, 251, 1], 1: [751]}
    return Student(components, 751, schedules, "tiny-teacher", {"iterations": 3}, shared_up_blocks=1)


@pytest.fixture
def path(tmp_path):
    save_student(tmp_path / "student.safetensors", student(tiny.sd15()))
    return tmp_path / "student.safetensors"


def rewrite(path, tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    save_file(load_file(path) if tensors is None else tensors, path, kept | metadata)


@pytest.mark.parametrize("make", [tiny.sd15, tiny.v_prediction, tiny.emoji])
@torch.no_grad()
def test_saved_and_loaded_is_bit_equal(make, tmp_path):
    original = student(make())
    save_student(tmp_path / "student.safetensors", original)
    loaded = load_student(tmp_path / "student.safetensors")
    for part in PARTS:
        a, b = getattr(loaded.components, part), getattr(original.components, part)
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())
        assert not a.training
    for name in ("encoder_timestep", "schedules", "base_model", "provenance", "shared_up_blocks", "declared"):
        assert getattr(loaded, name) == getattr(original, name)
    assert (loaded.components.name, loaded.components.license) == (original.components.name, "apache-2.0")
    prompts = ["a cat", "", "x" * 99]
    ids, mask = tokenize(loaded.components, prompts)
    expected_ids, expected_mask = tokenize(original.components, prompts)
    assert torch.equal(ids, expected_ids)
    assert mask is expected_mask is None or torch.equal(mask, expected_mask)
    text = encode_text(original.components, prompts)
    assert torch.equal(encode_text(loaded.components, prompts), text)
    noise = torch.randn(3, original.components.unet.config.in_channels, 8, 8)
    assert torch.equal(loaded.tiue()(noise, text), original.tiue()(noise, text))


def test_an_older_file_shares_no_up_blocks(path):
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "shared_up_blocks"}
    save_file(load_file(path), path, metadata)
    assert load_student(path).shared_up_blocks == 0


def test_a_file_of_before_the_rename_has_its_license(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["licence"] = metadata.pop("license")
    save_file(load_file(path), path, metadata | {"format": "pt"})  # with another program's key, which is not JSON
    assert load_student(path).components.license == "apache-2.0"


def test_the_tokenizer_of_clip_survives(golden_components, tmp_path):
    save_student(tmp_path / "student.safetensors", student(golden_components))
    loaded = load_student(tmp_path / "student.safetensors").components
    prompts = ["A cat, on a MAT!", "", "naïve café 猫", "long " * 100]
    assert torch.equal(tokenize(loaded, prompts)[0], tokenize(golden_components, prompts)[0])


def test_float16_halves_the_file_and_loads_as_float32(path, tmp_path):
    half = tmp_path / "half.safetensors"
    save_student(half, student(tiny.sd15()), torch.float16)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    loaded = load_student(half).components.unet.state_dict()
    for name, tensor in tiny.sd15().unet.state_dict().items():
        assert torch.equal(loaded[name], tensor.half().float())


def test_it_names_no_path_of_the_machine_it_was_made_on(tmp_path):
    from tiue.components import load_components

    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")
    save_student(tmp_path / "student.safetensors", student(load_components(directory)))
    assert str(tmp_path).encode() not in (tmp_path / "student.safetensors").read_bytes()


def test_step_counts(path):
    loaded = load_student(path)
    assert loaded.tiue().schedule.timesteps == (751, 501, 251, 1)
    assert loaded.tiue(1).schedule.timesteps == (751,)
    with pytest.raises(ValueError, match=r"trained for \[1, 4\] steps, not 2"):
        loaded.tiue(2)


def test_a_diverged_student_is_not_saved_and_nothing_is_left(path):
    before = path.read_bytes()
    broken = student(tiny.sd15())
    broken.components.unet.conv_in.weight.data[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"unet\.conv_in\.weight is not finite"):
        save_student(path, broken)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch):
    def interrupted(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr("tiue.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_student(path, student(tiny.sd15()))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(path):
    path.write_text("hello")


def not_a_student(path):
    save_file({"x": torch.zeros(1)}, path)


def newer(path):
    rewrite(path, tiue_student="2")


def lacks_a_tensor(path):
    tensors = load_file(path)
    del tensors["unet.conv_in.weight"]
    rewrite(path, tensors)


def has_another_tensor(path):
    rewrite(path, load_file(path) | {"unet.extra": torch.zeros(1)})


def has_another_part(path):
    rewrite(path, load_file(path) | {"extra.weight": torch.zeros(1)})


def misshapen(path):
    rewrite(path, load_file(path) | {"unet.conv_in.weight": torch.zeros(1)})


def malformed(path):
    rewrite(path, schedules="{")


def incomplete(path):
    rewrite(path, vae=json.dumps({}))


def of_other_types(path):
    rewrite(path, share_encoder='"false"')


def of_an_unknown_class(path):
    rewrite(path, vae=json.dumps({"_class_name": "VQModel"}))


def with_a_damaged_tokenizer(path):
    rewrite(path, tokenizer=json.dumps({"version": "1.0"}))


def without_a_named_schedule(path):
    rewrite(path, schedules="[]")


def without_a_schedule(path):
    rewrite(path, schedules="{}")


def with_an_empty_schedule(path):
    rewrite(path, schedules='{"0": []}')


def unordered(path):
    rewrite(path, schedules='{"2": [1, 501]}')


def with_another_count(path):
    rewrite(path, schedules='{"4": [501, 1]}')


def with_a_timestep_in_words(path):
    rewrite(path, schedules='{"2": ["501", "1"]}')


def with_too_many_shared_up_blocks(path):
    rewrite(path, shared_up_blocks="9")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "no such checkpoint"),
        (truncated, "damaged, or cut short: it has"),
        (not_safetensors, "not a safetensors file, or is damaged"),
        (not_a_student, "not a TiUE student"),
        (newer, "student format 2; this tiue reads up to 1"),
        (lacks_a_tensor, r"lacks tensor unet\.conv_in\.weight"),
        (has_another_tensor, r"an unexpected tensor unet\.extra"),
        (has_another_part, r"an unexpected tensor extra\.weight"),
        (misshapen, r"a wrong shape for unet\.conv_in\.weight"),
        (malformed, "malformed metadata"),
        (incomplete, "incomplete or malformed metadata"),
        (of_other_types, "share_encoder is 'false': expected bool"),
        (of_an_unknown_class, "VQModel is not supported: expected AutoencoderKL or AutoencoderTiny"),
        (with_a_damaged_tokenizer, "a malformed tokenizer"),
        (without_a_named_schedule, r"malformed metadata: schedules is \[\]: expected dict"),
        (without_a_schedule, "names no schedule"),
        (with_an_empty_schedule, r"timesteps must lie in 0\.\.999, got \[\]"),
        (unordered, r"timesteps must be descending, got \[1, 501\]"),
        (with_another_count, r"expected 4 timesteps, and one for the encoder, found \[501, 1\] and 751"),
        (with_a_timestep_in_words, "expected 2 timesteps"),
        (with_too_many_shared_up_blocks, "shared_up_blocks: expected 0 to 1"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(path, damage, message):
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_student(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# Weights that several names share.


def with_a_t5():
    """A model whose text encoder has one embedding under two names."""
    torch.manual_seed(1)
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return replace(tiny.sd15(), text_encoder=T5EncoderModel(config).eval())


@torch.no_grad()
def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    original, path = student(with_a_t5()), tmp_path / "student.safetensors"
    check_savable(original)
    save_student(path, original)
    loaded = load_student(path).components.text_encoder
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    for name, tensor in original.components.text_encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    prompts = ["a cat"]
    assert torch.equal(encode_text(load_student(path).components, prompts), encode_text(original.components, prompts))
    assert sum("shared" in name or "embed_tokens" in name for name in load_file(path)) == 1
    save_student(tmp_path / "again.safetensors", load_student(path), torch.float16)
    assert load_student(tmp_path / "again.safetensors").components.text_encoder.shared.weight.dtype == torch.float32


@torch.no_grad()
def test_a_text_encoder_with_shared_tensors_is_exported(tmp_path):
    save_student(tmp_path / "student.safetensors", Student(with_a_t5(), 751, SCHEDULES))
    components = load_student(tmp_path / "student.safetensors").components
    graph = ir.to_proto(text_encoder_graph(components, torch.float32)).SerializeToString()
    ids = torch.randint(128, (2, 9))
    given = {bundle.INPUT_IDS: ids.numpy(), bundle.ATTENTION_MASK: torch.ones_like(ids).numpy()}
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
    expected = components.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(made), expected, atol=REORDERED, rtol=REORDERED)


def test_any_part_may_share_tensors_and_views_of_the_same_memory(tmp_path):
    components = tiny.sd15()
    resnet = components.unet.down_blocks[0].resnets[0]
    resnet.norm2.weight = resnet.norm1.weight  # tied
    memory = torch.randn(32)
    resnet.norm1.bias = nn.Parameter(memory[:16])  # two halves of the same memory
    resnet.norm2.bias = nn.Parameter(memory[16:])
    components.vae.encoder.conv_norm_out.bias = components.vae.encoder.conv_norm_out.weight
    save_student(tmp_path / "student.safetensors", student(components))
    loaded = load_student(tmp_path / "student.safetensors").components
    own = loaded.unet.down_blocks[0].resnets[0]
    assert own.norm1.weight is own.norm2.weight
    assert loaded.vae.encoder.conv_norm_out.bias is loaded.vae.encoder.conv_norm_out.weight
    for part in PARTS:
        expected = getattr(components, part).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in getattr(loaded, part).state_dict().items())


@pytest.mark.parametrize(
    "aliases", [{"unet.x": "unet.y"}, {"unet.conv_in.bias": "unet.conv_out.bias"}, ["x"], {"x": 1}]
)
def test_malformed_aliases_are_refused(path, aliases):
    rewrite(path, aliases=json.dumps(aliases))
    with pytest.raises(CheckpointError, match="malformed metadata"):
        load_student(path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_taken_off_with_a_warning(path, prefix):
    rewrite(path, {name.replace("unet.", f"unet.{prefix}", 1): t for name, t in load_file(path).items()})
    with pytest.warns(UserWarning, match="removed the prefix .* from names of unet's tensors"):
        loaded = load_student(path).components.unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.sd15().unet.state_dict().items())


# What cannot be saved is known before a run.


@pytest.mark.parametrize("make", [tiny.sd15, tiny.v_prediction, tiny.emoji, with_a_t5])
def test_a_student_that_can_be_saved_passes(make, tmp_path):
    check_savable(student(make()))
    save_student(tmp_path / "student.safetensors", student(make()))


def not_finite(components):
    components.vae.decoder.conv_in.weight.data[0] = float("inf")


def of_eight_bits(components):
    components.text_encoder.to(torch.float8_e4m3fn)


def of_complex_numbers(components):
    components.unet.conv_in.bias = nn.Parameter(torch.zeros(16, dtype=torch.complex64))


def without_values(components):
    components.vae.to("meta")


def sparse(components):
    components.unet.conv_in.bias = nn.Parameter(torch.zeros(16).to_sparse())


def with_a_quantized_layer(components):
    layer = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    components.unet.time_embedding.linear_1 = layer(16, 64)


def with_an_adapter(components):
    components.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def of_another_shape(components):
    components.unet.conv_in = nn.Conv2d(4, 16, 1)


def configured_with_an_object(components):
    components.unet.register_to_config(own=object())


def quantized_by_configuration(components):
    components.text_encoder.config.quantization_config = {"quant_method": "gptq"}


def with_a_class_of_ones_own(components):
    components.text_encoder.__class__ = type("OwnTextModel", (type(components.text_encoder),), {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_finite, r"vae\.decoder\.conv_in\.weight is not finite"),
        (of_eight_bits, r"text_encoder\..* is torch\.float8_e4m3fn: expected float32"),
        (of_complex_numbers, r"unet\.conv_in\.bias is torch\.complex64"),
        (without_values, r"vae\..* has no values"),
        (sparse, r"unet\.conv_in\.bias is of an unsupported kind"),
        (with_a_quantized_layer, r"unet\.time_embedding\.linear_1 is a quantized module"),
        (with_an_adapter, "unet is not the module that its configuration describes.*adapters"),
        (of_another_shape, r"unet is not the module that its configuration describes: conv_in\.weight differs"),
        (configured_with_an_object, "the student's unet cannot be stored as JSON"),
        (quantized_by_configuration, "text_encoder is quantized"),
        (with_a_class_of_ones_own, "OwnTextModel is not supported"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(damage, message):
    components = tiny.sd15()
    damage(components)
    with pytest.raises(CheckpointError, match=message) as refused:
        check_savable(student(components))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


class SlowTokenizer:
    model_max_length = 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": SlowTokenizer()}, "SlowTokenizer cannot be stored: expected a fast tokenizer"),
        ({"vae": tiny.emoji().vae}, "cannot be exported: the UNet has 4 latent channels but the VAE 16"),
        ({"scheduler_config": {"_class_name": "DDIMScheduler"}}, "no DDIM equivalent"),
        ({"scheduler_config": tiny.SCHEDULER | {"own": object()}}, "scheduler cannot be stored as JSON"),
    ],
)
def test_a_model_that_cannot_be_saved_or_exported_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        check_savable(student(replace(tiny.sd15(), **changes)))


def test_provenance_that_is_not_json_is_refused():
    with pytest.raises(CheckpointError, match="provenance cannot be stored as JSON"):
        check_savable(replace(student(tiny.sd15()), provenance={"made by": object()}))
    with pytest.raises(CheckpointError, match=r"provenance is \['warm'\]: expected dict"):
        check_savable(replace(student(tiny.sd15()), provenance=["warm"]))


@pytest.mark.parametrize("name", ["", "two\nlines", "half\ud83d", "bell\x07", "x" * 300, 7])
def test_names_that_a_bundle_cannot_hold_are_refused(name):
    for changed in (
        replace(student(tiny.sd15()), components=replace(tiny.sd15(), name=name)),
        replace(student(tiny.sd15()), base_model=name),
    ):
        with pytest.raises(CheckpointError, match="expected 1 to 200 printable characters"):
            check_savable(changed)
