import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import pipelines
from tiue.components import encode_text, load_components, tokenize

# Parameters of the published models, from their cards and checkpoints.
PARAMETERS = {"sd15": (859_520_964, 123_060_480), "sd21-base": (865_910_724, 340_387_840)}
VAE_PARAMETERS = 83_653_863
TAESD_PARAMETERS = 2_445_063


def parameters(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("model", PARAMETERS)
def test_full_size_configurations_have_the_published_sizes(model):
    layout = pipelines.LAYOUTS[model]
    unet = parameters(lambda: UNet2DConditionModel(**pipelines._SD_UNET, **layout.unet))
    text = parameters(lambda: CLIPTextModel(CLIPTextConfig(**pipelines._SD_CLIP, **layout.text_encoder)))
    assert (unet, text) == PARAMETERS[model]
    assert parameters(lambda: AutoencoderKL(**pipelines._SD_VAE, **layout.vae)) == VAE_PARAMETERS


@pytest.mark.parametrize(("model", "pad"), [("tiny", 49407), ("tiny21", 0)])
def test_pipeline_is_written_sharded_and_loads(tmp_path, model, pad):
    out = tmp_path / model
    assert pipelines.main([model, str(out), "--dtype", "fp16", "--max-shard-size", "9MB", "--scheduler", "ddpm"]) == 0
    assert len(list((out / "unet").glob("*.safetensors"))) > 1
    components = load_components(out)
    assert (components.licence, components.scheduler_config["_class_name"]) == ("apache-2.0", "DDPMScheduler")
    ids, _ = tokenize(components, ["A red heart, 3D!"])
    assert ids.shape == (1, 77) and ids[0, 0] == 49406 and 49407 in ids[0] and ids[0, -1] == pad
    slow = CLIPTokenizer.from_pretrained(out / "tokenizer")("A red heart, 3D!", padding="max_length")
    assert slow.input_ids == ids[0].tolist()
    with torch.no_grad():
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        eps = components.unet(latents, 751, encode_text(components, ["a red heart"])).sample
        image = components.vae.decode(eps).sample
    assert image.shape == (1, 3, 128, 128)
    assert 0.05 < eps.std() < 5 and 0.05 < image.std() < 5


def test_taesd_is_an_autoencoder_alone(tmp_path):
    vae = AutoencoderTiny.from_pretrained(pipelines.write_pipeline("taesd", tmp_path / "taesd"))
    assert sum(p.numel() for p in vae.parameters()) == TAESD_PARAMETERS


def test_same_seed_same_weights_and_no_directory_is_overwritten(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pipelines.write_pipeline("taesd", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert pipelines.main(["tiny", str(tmp_path / "a")]) == 2
    assert "exists" in capsys.readouterr().err
