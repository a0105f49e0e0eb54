import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from tiue_runtime.noise import gaussian
from tolerances import REORDERED
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import pipelines, stable_diffusion
from benchmarks.comparing import ROOT, BenchmarkError, Conditions, Entry, compare
from benchmarks.contender import SEED, Tiue
from benchmarks.peers import diffusers
from export.onnx import main as export_main
from tiue.components import encode_text, load_components, tokenize

# Parameters of the published models.
PARAMETERS = {"sd15": (859_520_964, 123_060_480), "sd21-base": (865_910_724, 340_387_840)}
VAE_PARAMETERS = 83_653_863
TAESD_PARAMETERS = 2_445_063


def parameters(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("model", PARAMETERS)
def test_full_size_configurations_have_the_published_sizes(model):
    layout = pipelines.LAYOUTS[model]
    unet = parameters(lambda: UNet2DConditionModel(**(pipelines._SD_UNET | layout.unet)))
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


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where the pipeline, the bundle and optimum's directory of mini21 are."""
    directory = tmp_path_factory.mktemp("benchmarks")
    # Two processes less, each of which would import torch, than if make_ready made everything, as for tiny21.
    pipeline = pipelines.write_pipeline("mini21", directory / "mini21")
    assert export_main(["--ckpt", str(pipeline), "--out", str(directory / "mini21-bundle")]) == 0
    stable_diffusion.make_ready("mini21", directory, None, ["tiue", "optimum"])
    return directory


@pytest.mark.parametrize("model", ["mini21", pytest.param("tiny21", marks=pytest.mark.slow)])
def test_benchmark_runs_ours_beside_the_peer(model, work, capsys):
    report = work / f"{model}.json"
    flags = ["--model", model, "--work", str(work), "--runs", "1", "--json", str(report)]
    assert stable_diffusion.main(flags) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "128x128, 4 DDIM timesteps" in printed
    contenders = json.loads(report.read_text())["contenders"]
    assert [*contenders] == ["tiue", "optimum"]
    assert all(f"\n{name}" in printed for name in contenders)
    for measured in contenders.values():
        assert measured["timesteps"] == [751, 501, 251, 1]
        assert measured["difference"] < REORDERED
        assert 0 < measured["loaded_peak_bytes"] <= measured["peak_bytes"]
        assert measured["disk_bytes"] > 0 and measured["start_seconds"][0] > 0
        assert measured["first_seconds"]["1"] and 0 < sum(measured["stages"]["1"][0].values()) < 60
    assert contenders["tiue"]["peak_bytes"] < contenders["optimum"]["peak_bytes"]  # it has no torch to load


def test_another_network_is_refused(work, tmp_path):
    ours, other = work / "mini21-bundle", tmp_path / "other"
    shutil.copytree(ours, other)
    graph = onnx.load(other / "unet_decoder.onnx")
    for weight in graph.graph.initializer:
        if len(weight.dims) == 4:
            weight.raw_data = (-onnx.numpy_helper.to_array(weight)).tobytes()
    onnx.save(graph, other / "unet_decoder.onnx")
    entries = {"ours": Entry("tiue", ours), "other": Entry("tiue", other)}
    conditions = Conditions("cpu", 1, (4, 16, 16), 8, steps=4, batches=(1,), runs=1)
    with pytest.raises(BenchmarkError, match=r"^other: .* from ours's, so they are different networks"):
        compare(entries, conditions, apart=False, progress=print)
    measured = compare({"ours": entries["ours"]}, conditions, apart=True, progress=print)
    assert len(measured["ours"].start_seconds) == len(measured["ours"].seconds[1]) == 1


def test_optimum_samples_as_diffusers_does(work, tmp_path):
    given = {"kind": "optimum", "directory": str(work / "mini21-optimum"), "device": "cpu", "threads": 1, "options": {}}
    request = {"do": "picture", "shape": [4, 16, 16], "batch": 2, "steps": 4, "save": str(tmp_path / "optimum.npy")}
    command = [sys.executable, "-m", "benchmarks.contender", json.dumps(given)]
    done = subprocess.run(command, input=json.dumps(request) + "\n", cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[1])["shape"] == [2, 128, 128, 3]
    latents = np.stack([gaussian(SEED + i, (4, 16, 16)) for i in range(2)])
    expected, stages = diffusers(work / "mini21", torch.get_num_threads(), "cpu").picture(latents, 4)
    assert stages.keys() == {"text_encoder", "unet", "vae_decoder"}
    assert expected.std() > 0.01 and abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(np.load(tmp_path / "optimum.npy"), expected, atol=REORDERED, rtol=0)


def test_cuda_graphs_record_each_shape_once(monkeypatch):
    calls = []

    class Fake:
        bundle = SimpleNamespace(manifest=SimpleNamespace(pixels_per_latent=8))

        def __call__(self, prompt, *, latents, memory, **options):
            calls.append(len(latents))
            return SimpleNamespace(images=latents, timings={"total": 1.0, "unet_encoder": 0.5}, memory=memory)

        def warmup(self, **options):
            calls.append(options)

    monkeypatch.setattr("tiue_runtime.Pipeline", SimpleNamespace(load=lambda *_, **options: Fake()))
    contender = Tiue("bundle", "cuda", cuda_graphs=True)
    for batch in (1, 4, 1, 4):
        latents = np.zeros((batch, 4, 16, 24), np.float32)
        assert contender.picture(latents, 4)[1] == {"unet_encoder": 0.5}
    shape = {"steps": 4, "height": 128, "width": 192, "memory": "parallel"}
    assert calls == [{"num_images": 1, **shape}, 1, {"num_images": 4, **shape}, 4, 1, 4]


def test_what_cannot_be_measured_is_said_in_one_line(work, capsys, monkeypatch):
    flags = ["--model", "mini21", "--work", str(work), "--contenders", "tiue"]
    assert stable_diffusion.main([*flags, "--size", "100"]) == 2
    assert "expected a multiple of 16, got 100" in capsys.readouterr().err
    assert stable_diffusion.main([*flags, "--contenders", "tiue-taesd"]) == 2
    assert "tiue-taesd ended with status 1" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert stable_diffusion.main(["--device", "cuda"]) == 2
    assert "nvidia-smi" in capsys.readouterr().err
