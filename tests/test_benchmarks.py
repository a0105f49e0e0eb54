import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from PIL import Image, ImageColor
from tolerances import REORDERED
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import latency, memory, pipelines, scaling, training
from benchmarks import report as report_
from benchmarks.comparing import Comparison, Conditions, Entry, Measured, compare
from benchmarks.contender import Tiue
from benchmarks.flops import unet_flops
from benchmarks.installed import Installed, measure
from export.onnx import main as export_main
from tiue.checkpoint import load_student
from tiue.components import load_components
from tiue.text_encoder import encode_text, tokenize

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
    assert (components.license, components.scheduler_config["_class_name"]) == ("apache-2.0", "DDPMScheduler")
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


def test_the_64_pixel_model_as_a_pipeline_has_its_weights(tmp_path, capsys):
    written = load_components(pipelines.write_pipeline("emoji", tmp_path / "emoji"))
    shipped = load_student(pipelines.EMOJI).components
    assert written.license == shipped.license
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = [c.unet(noise, 751, encode_text(c, ["a red heart"])).sample for c in (written, shipped)]
        assert torch.equal(*latents) and torch.equal(*(c.vae.decode(latents[0]).sample for c in (written, shipped)))
    assert pipelines.main(["emoji", str(tmp_path / "fp16"), "--dtype", "fp16"]) == 2
    assert "emoji: expected no options" in capsys.readouterr().err


def test_same_seed_same_weights_and_no_directory_is_overwritten(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pipelines.write_pipeline("taesd", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert pipelines.main(["tiny", str(tmp_path / "a")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The directory with the pipeline and the bundle of mini21."""
    directory = tmp_path_factory.mktemp("benchmarks")
    # The benchmark would start two processes for these, each of which would import torch.
    pipeline = pipelines.write_pipeline("mini21", directory / "mini21")
    assert export_main(["--ckpt", str(pipeline), "--out", str(directory / "mini21-bundle-fp32")]) == 0
    return directory


def flags_for(work, *flags):
    return ["--model", "mini21", "--work", str(work), "--threads", "1", "--runs", "1", *map(str, flags)]


@pytest.mark.slow
def test_latency_end_to_end(work, tmp_path, capsys):
    out = tmp_path / "figures"
    contenders = "tiue tiue:memory=low torch diffusers openvino tiue:vae=tiny"
    flags = flags_for(work, "--contenders", contenders, "--python", "openvino=/absent", "--out", out)
    flags += ["--bundle", f"fp32={work / 'mini21-bundle-fp32'}"]  # This bundle has no tiny VAE.
    assert latency.main(flags) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "32x32, 4 DDIM timesteps" in printed
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["schema"] == "tiue-latency/1" and report["about"]["cpu"]
    assert report["skipped"].keys() == {"openvino", "tiue:vae=tiny"}  # Both are reported below.
    assert (
        "Left out: openvino: no such interpreter: /absent" in printed and "Left out: tiue:vae=tiny: it said" in printed
    )
    measured = report["contenders"]
    assert measured.keys() == {"tiue", "tiue:memory=low", "torch", "diffusers"}
    for name, m in measured.items():
        assert f"| {name} " in printed and f"| {name} " in (tmp_path / "figures.md").read_text()
        assert m["timesteps"] == [751, 501, 251, 1]
        assert 0 < m["loaded_peak_bytes"] <= m["peak_bytes"] and m["weights_bytes"] > 0
        assert 0 < m["load_seconds"][0] < m["cold_seconds"][0] and m["first_seconds"]["1"][0] > 0
        stages = m["stages"]["1"][0]
        assert {stage.partition("_")[0] for stage in stages} == {"text", "unet", "vae"} and min(stages.values()) > 0
        assert sum(stages.values()) <= m["seconds"]["1"][0]
    assert measured["torch"]["compared"]["eps"]["value"] < REORDERED
    assert measured["diffusers"]["compared"]["eps"]["value"] < REORDERED
    for name in ("tiue:memory=low", "torch"):
        assert all(measured[name]["compared"][what]["reference"] == "tiue" for what in ("latents", "picture"))
        assert all(measured[name]["compared"][what]["value"] > 90 for what in ("latents", "picture"))
    # tiue neither loads nor installs torch.
    assert measured["tiue"]["peak_bytes"] < measured["torch"]["peak_bytes"]
    assert 0 < measured["tiue"]["installed"]["bytes"] < measured["torch"]["installed"]["bytes"]
    with Image.open(tmp_path / "figures.png") as chart:
        colors = {color for _, color in chart.convert("RGB").getcolors(maxcolors=2**24)}
        assert chart.format == "PNG" and min(chart.size) > 300
    assert {ImageColor.getrgb(report_.STAGES[stage]) for stage in ("unet", "vae")} <= colors


@pytest.mark.slow
def test_optimum_agrees_with_diffusers(work, tmp_path):
    flags = flags_for(work, "--contenders", "diffusers", "optimum", "--out", tmp_path / "out", "--batches", 1, 2)
    assert latency.main(flags) == 0
    compared = json.loads((tmp_path / "out.json").read_text())["contenders"]["optimum"]["compared"]
    assert compared["latents"]["value"] > 90 and compared["picture"]["value"] > 90


def broken(bundle, directory, graph):
    """Copy a bundle, and turn the sign of all convolutions of one graph."""
    shutil.copytree(bundle, directory)
    model = onnx.load(directory / f"{graph}.onnx")
    for weight in model.graph.initializer:
        if len(weight.dims) == 4:
            weight.raw_data = (-onnx.numpy_helper.to_array(weight)).tobytes()
    onnx.save(model, directory / f"{graph}.onnx")


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ("unet_decoder", "so they are different networks"),
        ("vae_decoder", r"its picture is -?\d+\.\d dB from tiue's, expected more than 30"),
    ],
)
def test_a_contender_that_computes_something_else_fails(work, tmp_path, capsys, graph, said):
    broken(work / "mini21-bundle-fp32", tmp_path / "broken", graph)
    flags = flags_for(work, "--contenders", "tiue tiue:bundle=other", "--bundle", f"other={tmp_path / 'broken'}")
    assert latency.main([*flags, "--out", str(tmp_path / "out")]) == 1
    assert re.search(rf"error: tiue:bundle=other: .*{said}", capsys.readouterr().err)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [*report["contenders"]] == ["tiue"] and re.search(f"WRONG: .*{said}", report["skipped"]["tiue:bundle=other"])


def test_with_apart_every_round_starts_a_process(work):
    entries = {"ours": Entry("tiue", work / "mini21-bundle-fp32")}
    conditions = Conditions(1, (4, 16, 16), 2, steps=4, batches=(1,), runs=2)
    ours = compare(entries, conditions, apart=True, progress=print).measured["ours"]
    assert len(ours.load_seconds) == len(ours.cold_seconds) == len(ours.seconds[1]) == 2


def test_installed_counts_requirements_and_the_extras_asked_for(tmp_path, monkeypatch):
    def distribution(name, size, *requires):
        (tmp_path / f"{name}.py").write_bytes(b"#" * size)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(lines))
        (info / "RECORD").write_text(f"{name}.py,,\n")

    distribution("tiue_a", 1000, "tiue_b>0", 'tiue_c; extra == "fast"', "tiue_absent")
    distribution("tiue_b", 200, "tiue_a")  # a cycle
    distribution("tiue_c", 30)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plain = measure(sys.executable, ["tiue-a", "tiue-not-installed"])
    assert (plain.bytes, plain.versions) == (1200, {"tiue-a": "1.0", "tiue-b": "1.0"})
    assert plain.absent == ["tiue-absent"]
    assert measure(sys.executable, ["tiue-a[fast]"]).bytes == 1230


def test_flops_of_both_halves_are_the_whole(work):
    config = json.loads((work / "mini21/unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        with FlopCounterMode(display=False) as whole:
            unet(torch.empty(2, 4, 16, 24), 1, torch.empty(2, 77, config["cross_attention_dim"]))
        with FlopCounterMode(display=False) as embedding:  # Both halves compute it.
            unet.time_embedding(torch.empty(2, config["block_out_channels"][0]))
    encoder, decoder = unet_flops(work / "mini21", (4, 16, 24), batch=2, steps=1)
    assert encoder + decoder == whole.get_total_flops() + embedding.get_total_flops()
    assert min(encoder, decoder) > 0
    assert unet_flops(work / "mini21", (4, 16, 24), batch=2, steps=4) == (encoder, 4 * decoder)


def test_scaling_end_to_end(work, tmp_path, capsys):
    flags = flags_for(work, "--batches", 1, 2, "--steps", 2, "--sizes", 16, 32, "--out", tmp_path / "scaling")
    flags += ["--bundle", f"fp32={work / 'mini21-bundle-fp32'}"]
    assert scaling.main(flags) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "scaling.json").read_text())
    points = {(p["batch"], p["steps"], p["size"]): p for p in report["points"]}
    assert points.keys() == {(1, 4, 32), (2, 4, 32), (1, 4, 16)}
    assert all(p["unet_seconds"] > 0 and p["measured"]["peak_bytes"] > 0 for p in points.values())
    assert points[2, 4, 32]["decoder_flops"] == 2 * points[1, 4, 32]["decoder_flops"]
    assert [*report["skipped"]] == ["Point(batch=1, steps=2, size=32)"]  # The bundle has no such schedule.
    with Image.open(tmp_path / "scaling.png") as figure:
        assert figure.format == "PNG" and figure.size[0] > 1000


@pytest.mark.parametrize("failing", [0, 2])
def test_scaling_writes_each_point_and_ends_at_once_without_the_first(work, tmp_path, monkeypatch, capsys, failing):
    calls = []

    def compare(entries, conditions, **_):
        calls.append(conditions)
        if len(calls) == 1 and not failing:
            return Comparison({}, {"tiue": "memory ran out"}, {})
        if len(calls) == failing:
            raise OSError("the disk is full")
        [batch] = conditions.batches
        seconds = {"seconds": {batch: [2.0]}, "stages": {batch: [{"unet": 1.0}]}}
        return Comparison({"tiue": Measured("cpu", Installed(), 1, peak_bytes=1, **seconds)}, {}, {})

    monkeypatch.setattr(scaling, "compare", compare)
    flags = flags_for(work, "--batches", 2, "--steps", 4, "--sizes", 64, "--out", tmp_path / "scaling")
    assert scaling.main([*flags, "--bundle", f"fp32={work / 'mini21-bundle-fp32'}"]) == 2
    said = capsys.readouterr().err
    if failing:
        [point] = json.loads((tmp_path / "scaling.json").read_text())["points"]
        assert (point["batch"], point["size"]) == (1, 32) and "the disk is full" in said
    else:
        assert len(calls) == 1 and "memory ran out" in said and not any(tmp_path.iterdir())


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
    contender = Tiue("bundle", "cuda", 2, cuda_graphs=True)
    for batch in (1, 4, 1, 4):
        latents = np.zeros((batch, 4, 16, 24), np.float32)
        assert contender.picture(latents, 4)[1] == {"unet_encoder": 0.5}
    shape = {"steps": 4, "height": 128, "width": 192, "memory": "parallel"}
    assert calls == [{"num_images": 1, **shape}, 1, {"num_images": 4, **shape}, 4, 1, 4]


def test_a_measurement_that_is_impossible_is_refused_in_one_line(work, capsys, monkeypatch):
    flags = flags_for(work)
    for more, said in (
        (["--size", "30"], "expected a multiple of 4, got 30"),
        (["--contenders", "ours"], "expected KIND or KIND:option=value,... with a kind of tiue, torch"),
        (["--contenders", "optimum:device=cuda"], "it is measured on cpu, not on cuda"),
        (["--contenders", "tiue:bundle=int9"], "expected fp32, fp16, int8, or --bundle int9=DIRECTORY"),
    ):
        assert latency.main([*flags, *more]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    for main, flag in ((latency, "--runs"), (scaling, "--batches"), (memory, "--threads"), (training, "--updates")):
        with pytest.raises(SystemExit):
            main.main([flag, "0"])
        assert f"argument {flag}: expected an integer above 0, got '0'" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "absent-compiler")
    assert latency.main([*flags, "--contenders", "torch:compile=true"]) == 2
    assert "needs a C++ compiler: expected absent-compiler" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert latency.main([*flags, "--device", "cuda"]) == 2
    assert "no GPU: nvidia-smi" in capsys.readouterr().err


def test_a_distillation_computes_what_the_plain_loop_computes(tmp_path, capsys):
    flags = ["--model", "tiny", "--work", str(tmp_path), "--updates", "2", "--rounds", "1", "--latents", "8"]
    assert training.main([*flags, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    plain, ours = (json.loads(line)["losses"] for line in lines[:2])
    assert [update.keys() for update in plain] == [{"vsd", "kl", "fake"}] * 3
    assert plain[0]["kl"] != plain[1]["kl"]
    assert all(one == pytest.approx({n: two[n] for n in one}, rel=1e-3) for one, two in zip(plain, ours, strict=True))
    assert re.fullmatch(r"[\d.]+ times as fast; losses differ by [\d.]+e-\d+ at most", lines[-1])


def test_memory_by_option_is_measured_beside_the_estimate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "OPTIONS", {"(defaults)": {}, "--fake-score full": {"fake_score": "full"}})
    flags = ["--model", "mini21", "--work", str(tmp_path), "--widths", "160,320", "--latents", "8", "--batch", "1"]
    assert memory.main([*flags, "--threads", "1"]) == 0
    rows = re.findall(r"^\| `(.+)` \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["(defaults)", "--fake-score full"]
    (plain, estimated), (full, estimated_full) = ((float(a), float(b)) for _, a, b in rows)
    assert full - plain == pytest.approx(estimated_full - estimated, rel=0.5)
