"""Signatures of bundles: keys and certificates are made here, and everything is offline."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from tiue_runtime import Bundle, BundleError, Pipeline
from tiue_runtime.bundle import write_bundle
from tiue_runtime.hub.pull import pull
from tiue_runtime.hub.signature import Trust, check_signature, sign
from tiue_runtime.tools.cli import main

TINY = Path(__file__).parents[1] / "runtime/tests/data/tiny"
PEM = serialization.Encoding.PEM


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TIUE_KEY", raising=False)
    return Bundle.load(shutil.copytree(TINY, tmp_path / "bundle"))


def save_key(key, path, password=None):
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.with_suffix(".pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path.with_suffix(".pem"), public


@pytest.fixture
def keys(tmp_path):
    return save_key(ec.generate_private_key(ec.SECP256R1()), tmp_path / "key")


@pytest.fixture
def other(tmp_path):
    return save_key(ec.generate_private_key(ec.SECP384R1()), tmp_path / "other")


def test_a_signed_bundle_is_accepted_loads_and_is_still_the_same_bundle(bundle, keys):
    path = sign(bundle, keys[0])
    assert path == bundle.directory / "model.sig"
    check_signature(bundle, Trust(keys[1]))
    assert Bundle.load(bundle.directory) == bundle
    assert write_bundle(bundle.directory, bundle.manifest).manifest.files == bundle.manifest.files
    Pipeline.load(bundle.directory, device="cpu")("a red heart", seed=1)


def test_the_command_of_openssf_accepts_the_signature(bundle, keys):
    path = sign(bundle, keys[0])
    command = [sys.executable, "-m", "model_signing", "verify", "key", bundle.directory, "--signature", path]
    done = subprocess.run([*command, "--public_key", keys[1]], capture_output=True, text=True)
    assert done.returncode == 0 and "succeeded" in done.stdout + done.stderr


def test_a_bundle_that_openssf_signed_is_accepted(bundle, keys):
    path = bundle.directory / "model.sig"
    command = [sys.executable, "-m", "model_signing", "sign", "key", bundle.directory, "--signature", path]
    subprocess.run([*command, "--private_key", keys[0]], check=True, capture_output=True)
    check_signature(bundle, Trust(keys[1]))


def test_without_a_signature_a_demanded_key_refuses(bundle, keys):
    with pytest.raises(BundleError, match="is not signed, and a signature is demanded"):
        check_signature(bundle, Trust(keys[1]))


@pytest.mark.parametrize("name", ["bundle.json", "unet_decoder.onnx", "README.md"])
def test_a_changed_file_is_refused(bundle, keys, name):
    sign(bundle, keys[0])
    with (bundle.directory / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(BundleError, match="signature is not valid"):
        check_signature(bundle, Trust(keys[1]))


def test_a_bundle_written_again_after_signing_is_refused(bundle, keys):
    sign(bundle, keys[0])
    (bundle.directory / "README.md").write_text("another card")
    write_bundle(bundle.directory, bundle.manifest)
    with pytest.raises(BundleError, match="signature is not valid"):
        check_signature(Bundle.load(bundle.directory), Trust(keys[1]))


def test_another_key_is_refused(bundle, keys, other):
    sign(bundle, other[0])
    with pytest.raises(BundleError, match="signature is not valid for the demanded key"):
        check_signature(bundle, Trust(keys[1]))


def test_a_signature_that_leaves_out_the_manifest_is_refused(bundle, keys):
    path = bundle.directory / "model.sig"
    command = [sys.executable, "-m", "model_signing", "sign", "key", bundle.directory, "--signature", path]
    command += ["--private_key", keys[0], "--ignore-paths", bundle.directory / "bundle.json"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(BundleError, match=r"signature is not valid|does not cover bundle\.json"):
        check_signature(bundle, Trust(keys[1]))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", b'{"dsseEnvelope": 1}', b"[" * 100_000])
def test_a_damaged_signature_is_one_line(bundle, keys, content):
    (bundle.directory / "model.sig").write_bytes(content)
    with pytest.raises(BundleError, match="signature is not valid") as caught:
        check_signature(bundle, Trust(keys[1]))
    assert "\n" not in str(caught.value)


def test_keys_that_cannot_be_used_are_one_line(bundle, keys, tmp_path):
    rsa_key, _ = save_key(rsa.generate_private_key(65537, 2048), tmp_path / "rsa")
    (tmp_path / "text.pem").write_text("no key")
    for key in (rsa_key, tmp_path / "text.pem", tmp_path / "none.pem", keys[1]):
        with pytest.raises(BundleError, match=r"cannot be (signed|read)"):
            sign(bundle, key)
    assert not (bundle.directory / "model.sig").exists()
    with pytest.raises(BundleError, match="expected either"):
        Trust()


def test_an_encrypted_key_needs_its_password(bundle, tmp_path, monkeypatch, capsys):
    private, public = save_key(ec.generate_private_key(ec.SECP256R1()), tmp_path / "locked", b"open sesame")
    command = ["sign", str(bundle.directory), "--private-key", str(private)]
    assert main(command) == 2 and "cannot be signed" in capsys.readouterr().err
    monkeypatch.setenv("TIUE_KEY_PASSWORD", "open sesame")
    assert main(command) == 0
    assert main(["verify", str(bundle.directory), "--key", str(public)]) == 0


def certificate(name, key, issuer=None, issuer_key=None, authority=False):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage), True
        )
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), False)
    return builder.sign(issuer_key or key, hashes.SHA256())


def test_certificates_are_accepted_below_their_root_only(bundle, tmp_path, capsys):
    root_key, stranger_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root, stranger = (
        certificate("root", root_key, authority=True),
        certificate("stranger", stranger_key, authority=True),
    )
    leaf = certificate("signer", key, root, root_key)
    for name, content in {"root": root, "stranger": stranger, "leaf": leaf}.items():
        (tmp_path / f"{name}.crt").write_bytes(content.public_bytes(PEM))
    private, _ = save_key(key, tmp_path / "signer")
    command = ["sign", str(bundle.directory), "--private-key", str(private)]
    assert main([*command, "--certificate", str(tmp_path / "leaf.crt"), "--chain", str(tmp_path / "root.crt")]) == 0
    verify = ["verify", str(bundle.directory), "--certificates"]
    assert main([*verify, str(tmp_path / "root.crt")]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main([*verify, str(tmp_path / "stranger.crt")]) == 2
    assert "signature is not valid" in capsys.readouterr().err


def test_a_pull_with_a_key_takes_signed_bundles_only(bundle, keys, other, tmp_path):
    source, trust = str(bundle.directory), Trust(keys[1])
    with pytest.raises(BundleError, match="is not signed, and a signature is demanded"):
        pull(source, trust=trust)
    sign(bundle, other[0])
    with pytest.raises(BundleError, match="signature is not valid"):
        pull(source, trust=trust)
    with pytest.raises(BundleError, match="neither"):
        Pipeline.load("tiny")
    sign(bundle, keys[0])
    pulled = pull(source, trust=trust)
    check_signature(Bundle.load(pulled.directory), trust)
    assert pull(source) == pulled  # without a demand, too


def test_the_environment_demands_a_key_of_everything_that_is_loaded(bundle, keys, other, monkeypatch, capsys):
    monkeypatch.setenv("TIUE_KEY", str(keys[1]))
    with pytest.raises(BundleError, match="is not signed"):
        Pipeline.load(bundle.directory)
    assert main(["pull", str(bundle.directory)]) == 2 and "is not signed" in capsys.readouterr().err
    sign(bundle, keys[0])
    Pipeline.load(bundle.directory, device="cpu")
    assert main(["pull", str(bundle.directory)]) == 0 and main(["verify", "tiny"]) == 0
    monkeypatch.setenv("TIUE_KEY", str(other[1]))
    with pytest.raises(BundleError, match="signature is not valid"):
        Pipeline.load("tiny")
    monkeypatch.setenv("TIUE_KEY", "/none.pem")
    with pytest.raises(BundleError, match="cannot be read"):
        Pipeline.load("tiny")


def test_without_the_library_the_extra_is_named(bundle, keys):
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from pathlib import Path; from tiue_runtime import Bundle; from tiue_runtime.hub.signature import sign\n"
        f"sign(Bundle.load({str(bundle.directory)!r}), Path({str(keys[0])!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert "pip install model-signing pyopenssl" in done.stderr.splitlines()[-1]


def test_signing_uses_no_network(bundle, keys):
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise OSError('the network is blocked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from tiue_runtime.tools.cli import main\n"
        f"assert main(['sign', {str(bundle.directory)!r}, '--private-key', {str(keys[0])!r}]) == 0\n"
        f"assert main(['verify', {str(bundle.directory)!r}, '--key', {str(keys[1])!r}]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((bundle.directory / "model.sig").read_text())["verificationMaterial"]
