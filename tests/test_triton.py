"""The target for Triton: a repository whose configurations fit its graphs, and whose pictures are the runtime's."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import tiny
from fake_triton import TYPES, Server, read_config
from test_export import SCHEDULES, assert_refused, export
from test_web_target import convolution, run
from tiue_runtime import Pipeline, bundle

from export.errors import ExportError
from export.export_options import Options
from export.plan import make_plan
from export.triton import model_name, repository_file, write_models
from export.writer import GraphWriter
from tiue.checkpoint import Student, save_student

TINY = Path(__file__).parents[1] / "runtime" / "tests" / "data" / "tiny"
ORT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The tiny bundle of the runtime's tests, arranged for Triton."""
    found, made = bundle.Bundle.load(TINY), tmp_path_factory.mktemp("triton") / "tiny"
    files = {graph: repository_file(found.manifest.name, graph) for graph in bundle.GRAPHS}
    for graph, file in files.items():
        (made / file).parent.mkdir(parents=True)
        shutil.copy(found.graph_path(graph), made / file)
    shutil.copy(found.tokenizer_path, made)
    manifest = replace(found.manifest, variants={bundle.PORTABLE: files}, memory={}, files={})
    write_models(made, manifest)
    bundle.write_bundle(made, manifest)
    return made


@pytest.fixture(scope="module")
def name(repository):
    return model_name(bundle.Bundle.load(repository).manifest.name)


@pytest.fixture(scope="module")
def server(repository, name):
    return Server(repository, name)


def pixels(pipeline, *arguments, **options):
    return np.stack([np.asarray(image) for image in pipeline(*arguments, **options).images])


@pytest.mark.parametrize("steps", [None, 2])
def test_a_picture_equals_the_runtimes(repository, server, steps):
    with Pipeline.load(repository, device="cpu") as pipeline:
        expected = pixels(pipeline, "a red heart", seed=2**63, steps=steps, memory="parallel")
    given = {} if steps is None else {"steps": [steps]}
    (answer,) = server.infer({"prompt": [b"a red heart"], "seed": [2**63], **given})
    assert answer.error() is None
    np.testing.assert_array_equal(answer.tensors["image"].as_numpy(), expected)
    assert answer.tensors["seed"].as_numpy().tolist() == [[2**63]]


def test_requests_that_wait_together_are_drawn_together_and_keep_their_pictures(repository, server):
    prompts, seeds = ["a red heart", "a blue star", "a red heart", "a blue star"], [7, 8, 9, 9]
    requests = [
        {"prompt": [b"a red heart", b"a blue star"], "seed": [7, 8]},
        {"prompt": [b"a red heart"], "seed": [9], "steps": [2]},
        {"prompt": [b"a blue star"], "seed": [9]},
    ]
    server.runs.clear()
    answers = server.infer(*requests)
    assert len(server.runs) == 2 * len(bundle.GRAPHS)  # once for each number of steps
    with Pipeline.load(repository, device="cpu") as pipeline:
        wanted = zip(prompts, seeds, [None, None, 2, None], strict=True)
        expected = [pixels(pipeline, text, seed=seed, steps=n, memory="parallel")[0] for text, seed, n in wanted]
    made = [picture for answer in answers for picture in answer.tensors["image"].as_numpy()]
    np.testing.assert_array_equal(np.stack(made), np.stack(expected))


def test_a_seed_that_nobody_gave_is_in_the_answer(server):
    (first,), (second,) = (server.infer({"prompt": [b"a red heart"]}) for _ in range(2))
    seed = first.tensors["seed"].as_numpy()
    assert seed != second.tensors["seed"].as_numpy()
    (again,) = server.infer({"prompt": [b"a red heart"], "seed": seed[:, 0]})
    assert np.array_equal(again.tensors["image"].as_numpy(), first.tensors["image"].as_numpy())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": [b"a red heart"], "steps": [3]}, "steps: this model was trained for 2, 4, got 3"),
        ({"prompt": [b"a red heart"], "height": [2**20]}, "width, height: the model was made for"),
        ({"prompt": [b"a red heart"], "width": [-8]}, "width, height: the model was made for"),
        ({"prompt": [b"\xff"]}, "prompt: expected UTF-8"),
        ({"prompt": [b"a", b"b"], "steps": [2, 4]}, "expected one value for a request"),
        ({"prompt": []}, "expected one value for a request, got []"),
    ],
)
def test_a_wrong_request_is_the_clients_mistake_and_nobody_elses(server, request_, message):
    wrong, right = server.infer(request_, {"prompt": [b"a red heart"], "seed": [1]})
    assert wrong.error().code == wrong.error().INVALID_ARG
    assert message in wrong.error().message()
    assert right.error() is None


def test_the_failure_of_a_graph_is_an_error_of_the_server(server, monkeypatch):
    def broken(self, *given):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(server.sessions, f"{server.config.name}_vae_decoder", type("Session", (), {"run": broken})())
    (answer,) = server.infer({"prompt": [b"a red heart"]})
    assert (answer.error().code, answer.error().message()) == (answer.error().INTERNAL, "out of memory")


def test_numbers_that_are_not_finite_make_no_picture(server, monkeypatch):
    def overflow(self, names, feed):
        return [np.full((1, 3, 64, 64), np.inf, np.float32)]

    monkeypatch.setitem(server.sessions, f"{server.config.name}_vae_decoder", type("Session", (), {"run": overflow})())
    (answer,) = server.infer({"prompt": [b"a red heart"]})
    assert "vae_decoder: expected finite numbers in image" in answer.error().message()


def assert_configurations_fit(repository, name):
    """Triton refuses a model whose inputs and outputs are not those of config.pbtxt."""
    for graph in bundle.GRAPHS:
        config = read_config(repository / f"{name}_{graph}" / "config.pbtxt")
        assert config[:3] == (f"{name}_{graph}", "onnxruntime", 0)
        session = ort.InferenceSession(repository / f"{name}_{graph}" / "1" / "model.onnx")
        for declared, values in ((config.inputs, session.get_inputs()), (config.outputs, session.get_outputs())):
            shapes = {v.name: [dim if isinstance(dim, int) else -1 for dim in v.shape] for v in values}
            assert {tensor.name: tensor.dims for tensor in declared} == shapes
            assert [TYPES[tensor.kind] for tensor in declared] == [ORT_TYPES[v.type] for v in values]


def test_the_configurations_fit_the_graphs(repository, name):
    assert_configurations_fit(repository, name)
    config = read_config(repository / name / "config.pbtxt")
    assert config[:3] == (name, "python", 4)
    assert [tensor.name for tensor in config.inputs if not tensor.optional] == ["prompt"]


def test_triton_reads_the_configurations(repository, name):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install tritonclient[grpc]")
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = sorted(repository.glob("*/config.pbtxt"))
    assert len(found) == 1 + len(bundle.GRAPHS)
    for path in found:
        parsed = text_format.Parse(path.read_text(), schema.ModelConfig())
        mine = read_config(path)
        assert (parsed.name, parsed.backend, parsed.max_batch_size) == mine[:3]
        assert parsed.name == path.parent.name
        for tensors, declared in ((parsed.input, mine.inputs), (parsed.output, mine.outputs)):
            read = [(t.name, schema.DataType.Name(t.data_type), list(t.dims)) for t in tensors]
            assert read == [tensor[:3] for tensor in declared]
        assert [tensor.optional for tensor in parsed.input] == [tensor.optional for tensor in mine.inputs]
        assert parsed.HasField("dynamic_batching") == (path.parent.name == name)


def test_a_repository_is_a_bundle_too(repository):
    found = bundle.Bundle.load(repository)
    found.verify()
    assert {f"{model_name(found.manifest.name)}/1/model.py", "tokenizer.json"} <= found.manifest.files.keys()


def test_weights_beside_a_graph_lie_in_its_folder(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 16, 3, 3)).astype(np.float32)
    writer, name = GraphWriter(tmp_path, deduplicate=False, file_limit=1024), "emoji_vae_decoder/1/model.onnx"
    writer.write(convolution(weight), name)
    assert {path.name for path in (tmp_path / name).parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    x = np.ones((1, 16, 8, 8), np.float32)
    (made,) = ort.InferenceSession(tmp_path / name).run(None, {"x": x})
    np.testing.assert_array_equal(made, run(convolution(weight), x))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("emoji", "emoji"), ("owner/sd-turbo", "owner_sd-turbo"), ("\u732b", "tiue"), ("../..", "tiue"), ("a\nb", "a_b")],
)
def test_the_name_of_a_model_fits_addresses_and_file_systems(given, expected):
    assert model_name(given) == expected
    assert len(repository_file("x" * 200, bundle.UNET_ENCODER)) < 150


def student(components):
    return Student(components, 751, SCHEDULES, "tiny-teacher")


def test_the_graphs_are_those_of_the_other_target():
    made = make_plan(student(tiny.sd15()), Options(target=("triton",)))
    assert made.targets == (bundle.PORTABLE,)
    assert make_plan(student(tiny.sd15()), Options(target=("cuda", "triton"))).targets == (bundle.CUDA,)
    assert set(made.manifest.variants[bundle.PORTABLE].values()) == {
        f"tiny-sd15_{graph}/1/model.onnx" for graph in bundle.GRAPHS
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ("triton", "web")}, "got triton,web"),
        ({"target": ("cpu", "cuda", "triton")}, "got cpu,cuda,triton"),
        ({"target": ("cpu", "triton"), "precision": "fp16"}, "the cpu target computes in fp32"),
        ({"target": ("cuda", "triton"), "precision": "int8"}, "CUDA has no such kernels"),
        ({"target": ("triton",), "vae": ("kl", "tiny"), "tiny_vae": object()}, "expected one image decoder"),
        ({"target": ("triton",), "upscaler": object()}, "no upscaler"),
    ],
)
def test_what_a_repository_cannot_hold_is_refused(options, message):
    with pytest.raises(ExportError, match=message):
        Options(**options)


def test_unchecked_pictures_are_asked_for(tmp_path, capsys):
    """A model with a safety checker would lose it in a repository, and must not do so silently."""
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "model")
    tiny.save_safety_checker(directory)
    status = export("--ckpt", directory, "--out", tmp_path / "out", "--target", "triton")
    assert_refused(capsys, status, "its model cannot check pictures, and --safety-checker is on", tmp_path, ["model"])


@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow  # a whole export
@pytest.mark.parametrize(("kind", "precision"), [("sd15", "fp16"), ("emoji", "fp32")])
def test_an_export_makes_a_repository(kind, precision, tmp_path):
    save_student(tmp_path / "student.safetensors", student(getattr(tiny, kind)()))
    out = tmp_path / "models"
    arguments = "--ckpt", tmp_path / "student.safetensors", "--out", out, "--target", "triton", "--precision", precision
    assert export(*arguments) == 0
    name = f"tiny-{kind}"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        name, *sorted(f"{name}_{graph}" for graph in bundle.GRAPHS)
    ]  # fmt: skip
    assert_configurations_fit(out, name)
    (answer,) = Server(out, name).infer({"prompt": [b"a cat", b"a dog"], "seed": [3, 4]})
    with Pipeline.load(out, device="cpu") as pipeline:
        expected = pixels(pipeline, ["a cat", "a dog"], seed=3, memory="parallel")
    np.testing.assert_array_equal(answer.tensors["image"].as_numpy(), expected)
    assert export(*arguments, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "student.safetensors"]
