import re
import shutil
from pathlib import Path

import pytest
import requests
import tiny
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from export import assemble as assembling
from export.errors import ExportError
from export.onnx import main
from export.source import load_source
from tiue import hub
from tiue.checkpoint import Student, save_student
from tiue.components import ComponentsError

SCHEDULES = {4: [751, 501, 251, 1]}
HUB_ID = "owner/model-1.5"


@pytest.fixture
def directory(tmp_path):
    return tiny.save_pipeline(tiny.sd15(), tmp_path / "base")


@pytest.fixture
def student_file(tmp_path):
    save_student(tmp_path / "student.safetensors", Student(tiny.sd15(), 751, SCHEDULES, "tiny-teacher"))
    return tmp_path / "student.safetensors"


@pytest.fixture
def no_hub(monkeypatch):
    def called(*arguments, **options):
        raise AssertionError(f"a network was asked for {arguments}")

    monkeypatch.setattr(hub, "HfApi", called)
    monkeypatch.setattr(hub, "snapshot_download", called)


# A file of UNet weights, with a pipeline for the rest.


def trained_unet():
    """Weights other than the base's own."""
    torch.manual_seed(7)
    return {name: torch.randn_like(t) for name, t in tiny.unet().state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_unets_weights_take_the_rest_from_the_base(directory, tmp_path, no_hub, prefix, dtype):
    shutil.move(directory / "unet" / "config.json", tmp_path / "config.json")
    shutil.rmtree(directory / "unet")  # its weights are not looked at
    (directory / "unet").mkdir()
    shutil.move(tmp_path / "config.json", directory / "unet" / "config.json")
    path, weights = tmp_path / "one-way.safetensors", trained_unet()
    save_file({prefix + name: t.to(dtype) for name, t in weights.items()}, path)

    student = load_source(path, [4, 1], base=directory)

    for name, tensor in student.components.unet.state_dict().items():
        assert torch.equal(tensor, weights[name].to(dtype).float())
        assert tensor.dtype == torch.float32
    assert not student.components.unet.training
    assert torch.equal(student.components.vae.decoder.conv_in.weight, tiny.sd15().vae.decoder.conv_in.weight)
    assert (student.components.name, student.base_model, student.components.license) == ("one-way", "base", "unknown")
    assert (student.encoder_timestep, student.schedules) == (751, {4: [751, 501, 251, 1], 1: [1]})


def test_a_pipeline_does_not_declare_its_training_and_a_student_does(directory, student_file, no_hub):
    assert not load_source(directory).declared
    assert load_source(student_file).declared


@pytest.mark.filterwarnings("ignore:.*safety_checker is left out")
def test_a_unet_for_the_original_layout(tmp_path, no_hub):
    tiny.save_original_sd15(tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    loaded = load_source(path, base=tmp_path / "base", safety_checker=False).components.unet.state_dict()
    own = load_source(tmp_path / "base", safety_checker=False).components.unet.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def lacks_one(weights):
    del weights["conv_in.bias"]
    return weights


def has_another(weights):
    return weights | {"extra.weight": torch.zeros(1)}


def misshapen(weights):
    return weights | {"conv_in.bias": torch.zeros(3)}


def with_a_text_encoder(weights):
    return {f"unet.{name}": t for name, t in weights.items()} | {"text_encoder.x": torch.zeros(1)}


def quantised(weights):
    return weights | {"conv_in.bias": torch.zeros(16, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks_one, r"lacks tensor conv_in\.bias \(1 in all\)"),
        (has_another, r"has an unexpected tensor extra\.weight \(1 in all\)"),
        (misshapen, r"wrong shape for conv_in\.bias: \[3\], not \[16\] \(1 in all\)"),
        (with_a_text_encoder, r"unexpected tensor text_encoder\.x"),
        (quantised, r"stores conv_in\.bias as torch\.int8"),
    ],
)
def test_weights_that_are_not_the_bases(directory, tmp_path, change, message):
    path = tmp_path / "unet.safetensors"
    save_file(change(trained_unet()), path)
    with pytest.raises(ComponentsError, match=message) as error:
        load_source(path, base=directory)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_base_goes_with_a_unets_weights_alone(directory, student_file, tmp_path, no_hub):
    bare = tmp_path / "unet.safetensors"
    save_file(trained_unet(), bare)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_text("hello")
    for arguments, message in (
        ((student_file, None, directory), "`base` goes with a file of UNet weights, but .* is a student"),
        ((directory, None, directory), "`base` goes with a file of UNet weights, but .* is a pipeline"),
        ((HUB_ID, None, directory), "`base` goes with a file of UNet weights, but .* is no such file"),
        ((damaged, None, directory), "damaged.safetensors is not a safetensors file, or is damaged"),
        ((bare,), "not a TiUE student; .* `base` must name"),
        ((bare, None, tmp_path / "nowhere"), "no such pipeline directory: .*nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            load_source(*arguments)


# Names: paths, and models on the Hub.


@pytest.mark.parametrize(
    "name",
    [
        "owner/student.safetensors",
        "student",
        "./owner/model",
        "../owner/model",
        "/owner/model",
        "~/model",
        "runs/owner/model",
        "owner/model/",
        "runs/model",  # runs/ is here, so it is a path
    ],
)
def test_a_mistyped_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ExportError, match="no such file or directory"):
        load_source(name)


class FakeHub:
    """A model's files, and a cache they are downloaded to."""

    def __init__(self, root, cache):
        self.root, self.cache, self.error = root, cache, None

    def list_repo_files(self, hub_id):
        if self.error:
            raise self.error
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def snapshot_download(self, hub_id, *, allow_patterns, local_files_only):
        assert (hub_id, local_files_only) == (HUB_ID, False)
        for name in filter_repo_objects(self.list_repo_files(hub_id), allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / name, self.cache / name)
        return str(self.cache)

    def downloaded(self):
        paths = [path for path in self.cache.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.cache)) for path in paths if path.suffix not in (".json", ".txt")}


@pytest.fixture
def fake_hub(directory, tmp_path, monkeypatch):
    """A repository as they are: weights in many forms, and much that is not needed."""
    fake = FakeHub(directory, tmp_path / "cache" / "0123abc")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    for path in list(directory.rglob("*.safetensors")):
        for other in (path.with_suffix(".fp16.safetensors"), path.with_suffix(".bin"), path.with_suffix(".msgpack")):
            other.write_bytes(b"too much")
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "safety_checker/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"too much")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return fake


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def test_a_model_on_the_hub(fake_hub):
    student = load_source(HUB_ID)
    assert fake_hub.downloaded() == {"README.md", UNET, VAE, TEXT}
    assert not (fake_hub.cache / "safety_checker").exists()
    assert (student.components.name, student.base_model) == ("model-1.5", "model-1.5")
    assert student.components.license == "mit"
    assert torch.equal(student.components.unet.conv_in.weight, tiny.sd15().unet.conv_in.weight)


def test_a_model_on_the_hub_in_float16_and_shards(fake_hub, directory):
    for name in (VAE, TEXT):
        weights = (directory / name).with_suffix(".fp16.safetensors")
        save_file({key: t.half() for key, t in load_file(directory / name).items()}, weights, {"format": "pt"})
        (directory / name).unlink()
    (directory / UNET).unlink()
    tiny.sd15().unet.save_pretrained(directory / "unet", max_shard_size="60KB")
    shards = {f"unet/{path.name}" for path in (directory / "unet").glob("*-of-*")}
    assert len(shards) > 1
    student = load_source(HUB_ID)
    fp16 = {name.replace(".safetensors", ".fp16.safetensors") for name in (VAE, TEXT)}
    assert fake_hub.downloaded() == {"README.md", *shards, *fp16}
    assert torch.equal(student.components.unet.conv_in.weight, tiny.sd15().unet.conv_in.weight)


def test_a_base_on_the_hub_without_its_unet(fake_hub, tmp_path):
    save_file(trained_unet(), tmp_path / "one-way.safetensors")
    student = load_source(tmp_path / "one-way.safetensors", base=HUB_ID)
    assert fake_hub.downloaded() == {"README.md", VAE, TEXT}
    assert student.base_model == "model-1.5"


def test_what_is_not_supported_is_refused_before_its_weights_come(fake_hub, directory):
    index = directory / "model_index.json"
    extra = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    tiny.edit_json(index, _class_name="StableDiffusionXLPipeline", **extra)
    with pytest.raises(ComponentsError, match="StableDiffusionXLPipeline is not supported"):
        load_source(HUB_ID)
    assert fake_hub.downloaded() == {"README.md"}
    index.unlink()
    shutil.rmtree(fake_hub.cache)
    with pytest.raises(ComponentsError, match=r"model_index\.json is missing"):
        load_source(HUB_ID)


def test_pickles_are_not_downloaded(fake_hub, directory):
    for path in directory.glob("unet/*.safetensors"):
        path.unlink()
    with pytest.raises(ComponentsError, match=f"{HUB_ID}: unet has no diffusion_pytorch_model.safetensors"):
        load_source(HUB_ID)
    assert fake_hub.downloaded() == {"README.md"}


def answer(kind):
    response = requests.Response()
    response.status_code = 401
    return kind("401 Client Error.\n\nCannot access the model\nat this address", response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(errors.RepositoryNotFoundError), "neither a path here nor a model on the Hugging Face Hub"),
        (answer(errors.GatedRepoError), "is gated: accept its terms"),
        (answer(errors.HfHubHTTPError), "cannot be downloaded from the Hugging Face Hub: 401 Client Error"),
        (requests.ConnectionError("no route\nto host"), r"cannot be downloaded .*no route \(HF_HUB_OFFLINE=1"),
    ],
)
def test_an_answer_of_the_hub_is_one_line(fake_hub, error, message):
    fake_hub.error = error
    with pytest.raises(ComponentsError, match=message) as refused:
        load_source(HUB_ID)
    assert str(refused.value).startswith(HUB_ID)
    assert "\n" not in str(refused.value)


def test_offline_an_earlier_download_is_used(tmp_path, monkeypatch):
    """The Hub's own code, on a cache laid out as it lays it out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ComponentsError, match=f"{HUB_ID} is not a path here, nor was it downloaded .* HF_HUB_OFFLINE"):
        load_source(HUB_ID)
    cached = tmp_path / "models--owner--model-1.5"
    tiny.save_pipeline(tiny.sd15(), cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    assert load_source(HUB_ID).components.name == "model-1.5"


# The command line.


@pytest.fixture
def exported(monkeypatch):
    """What the command would export, and where to."""
    calls = []
    monkeypatch.setattr(assembling, "export_bundle", lambda student, out, *_: calls.append((student, out)))
    return calls


def test_the_command_takes_a_hub_id(fake_hub, exported):
    assert main(["--ckpt", HUB_ID]) == 0
    ((student, out),) = exported
    assert (student.components.name, out) == ("model-1.5", Path("model-1.5-bundle"))


def test_the_command_takes_a_base(fake_hub, exported, directory, tmp_path):
    save_file(trained_unet(), tmp_path / "one-way.safetensors")
    assert main(["--ckpt", "one-way.safetensors", "--base", str(directory), "--steps", "2"]) == 0
    ((student, out),) = exported
    assert (student.schedules, out) == ({2: [501, 1]}, Path("one-way-bundle"))


def test_an_unknown_license_is_said(exported, directory, capsys, no_hub):
    assert main(["--ckpt", str(directory)]) == 0
    assert "warning: the license of" in capsys.readouterr().err
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["--ckpt", str(directory)]) == 0
    assert "the license of" not in capsys.readouterr().err


def test_the_command_names_flags(exported, tmp_path, capsys):
    save_file(tiny.original_layout(tiny.sd15()), tmp_path / "a1111.safetensors")
    assert main(["--ckpt", str(tmp_path / "a1111.safetensors")]) == 2
    assert "--base must name a diffusers pipeline directory" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(exported, no_hub, capsys):
    assert main(["--ckpt", "./owner/model"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "export.onnx: error: no such checkpoint: ./owner/model (no such file or directory)"
    )
    assert not exported


def test_shared_up_blocks(directory, student_file, no_hub):
    assert load_source(directory).shared_up_blocks == 0
    assert load_source(directory, shared_up_blocks=1).tiue().shared_up_blocks == 1
    assert load_source(student_file, shared_up_blocks=0).shared_up_blocks == 0
    with pytest.raises(ValueError, match="shared_up_blocks: expected 0 to 1"):
        load_source(directory, shared_up_blocks=2)
    with pytest.raises(ExportError, match=r"`shared_up_blocks` 1: .* was trained with 0 shared"):
        load_source(student_file, shared_up_blocks=1)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, part, value):
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path)
    (path,) = (directory / part).glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ExportError, match=rf"{part}\.{re.escape(name)} holds infinity or NaN"):
        load_source(directory)
