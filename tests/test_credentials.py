"""Content credentials: signed with a chain made here, read back by c2pa-python itself."""

import datetime
import io
import json
import socket

import pytest
from tiue_runtime import Pipeline, RequestError, read_record
from tiue_runtime.credentials import Credentials
from tiue_runtime.metadata import AI_SOURCE
from tiue_runtime.tools.cli import main

TINY = "runtime/tests/data/tiny"
ENDINGS = ("png", "jpg", "webp")

c2pa = pytest.importorskip("c2pa", reason="content credentials need c2pa-python: the extra [c2pa]")
pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Return the paths of a certificate chain and a key, and the root in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)

    def certificate(name, key, issuer, issuer_key, extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key, hashes.SHA256())

    def usage(**allowed):
        names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
        every = dict.fromkeys([*names.split(), "crl_sign", "encipher_only", "decipher_only"], False)
        return x509.KeyUsage(**{**every, **allowed})

    def name(common):
        organization = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Tests of TiUE")
        return x509.Name([organization, x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = (x509.BasicConstraints(ca=True, path_length=None), True), (usage(key_cert_sign=True), True)
    signer = (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usage(digital_signature=True), True),
        (x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False),
    )
    root = certificate(name("root"), root_key, name("root"), root_key, authority)
    leaf = certificate(name("signer"), key, name("root"), root_key, signer)
    pem = serialization.Encoding.PEM
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "chain.pem", folder / "key.pem", root.public_bytes(pem).decode()


@pytest.fixture(scope="module")
def result():
    return Pipeline.load(TINY, device="cpu")("a red heart", seed=5, height=64, width=64)


def manifest_store(path, root):
    """Return what c2pa-python reads from a file, with our root among the trusted ones."""
    settings = {"trust": {"user_anchors": root}, "verify": {"verify_trust": True}}
    with c2pa.Context.from_dict(settings) as context, path.open("rb") as file:
        mime = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}[path.suffix[1:]]
        with c2pa.Reader(mime, file, context=context) as reader:
            return json.loads(reader.json())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_signed_picture_says_that_a_model_created_it(result, chain, tmp_path, ending, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = tmp_path / f"a.{ending}"
    result.images[0].save(path, credentials=Credentials.load(*chain[:2]))
    store = manifest_store(path, chain[2])
    assert store["validation_state"] == "Trusted"
    manifest = store["manifests"][store["active_manifest"]]
    (actions,) = (a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))
    assert [(action["action"], action["digitalSourceType"]) for action in actions] == [("c2pa.created", AI_SOURCE)]
    assert manifest["signature_info"]["issuer"] == "Tests of TiUE"
    assert "time" not in manifest["signature_info"]  # No authority was asked.
    assert read_record(path) == result.images[0].record


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_changed_picture_is_no_longer_valid(result, chain, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    result.save(path, credentials=Credentials.load(*chain[:2]))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a red heart", b"a red hearT"))
    assert path.read_bytes() != content
    assert manifest_store(path, chain[2])["validation_state"] == "Invalid"


def test_wrong_keys_are_one_line_and_no_file(result, chain, tmp_path):
    certificates, key, _ = chain
    for wrong in (
        Credentials(b"", b""),
        Credentials(b"hello", b"hello"),
        Credentials(key.read_bytes(), certificates.read_bytes()),
        Credentials(certificates.read_bytes(), key.read_bytes(), "ed25519"),
    ):
        with pytest.raises(RequestError, match="credentials: ") as refused:
            result.save(tmp_path / "a.png", credentials=wrong)
        assert "\n" not in str(refused.value)
        assert "PRIVATE" not in str(refused.value) and "PRIVATE" not in repr(wrong)
    with pytest.raises(RequestError, match=r"private_key: cannot read .*none\.pem"):
        Credentials.load(certificates, tmp_path / "none.pem")
    with pytest.raises(RequestError, match="algorithm: expected one of es256"):
        Credentials.load(certificates, key, "rsa")
    assert not list(tmp_path.iterdir())


def test_signatures_go_to_streams_too(result, chain):
    buffer = io.BytesIO()
    result.images[0].save(buffer, "PNG", credentials=Credentials.load(*chain[:2]))
    assert b"c2pa" in buffer.getvalue()


def test_a_signature_that_reads_otherwise_is_refused(result, chain, tmp_path, monkeypatch):
    class Reader(c2pa.Reader):
        def json(self):
            return json.dumps({"validation_state": "Invalid"})

    monkeypatch.setattr(c2pa, "Reader", Reader)
    with pytest.raises(RequestError, match="expected a valid signature in the picture, but it reads as Invalid"):
        result.save(tmp_path / "a.png", credentials=Credentials.load(*chain[:2]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_command_line_signs(chain, tmp_path, capsys, ending):
    keys = ["--certificates", str(chain[0]), "--private-key", str(chain[1])]
    command = ["--bundle", TINY, *keys, "--quiet"]
    assert main(["generate", "a red heart", "-o", str(tmp_path / f"a.{ending}"), *command]) == 0
    assert main(["generate", "a red heart", "--grid", "-o", str(tmp_path / f"grid.{ending}"), *command]) == 0
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red heart"}')
    assert main(["batch", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--format", ending, *command]) == 0
    assert capsys.readouterr().err == ""
    for name in ("a", "grid", "out/000001"):
        assert manifest_store(tmp_path / f"{name}.{ending}", chain[2])["validation_state"] == "Trusted"


def test_the_command_line_refuses_a_wrong_key_before_anything_is_loaded(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    for flags in (["--private-key", str(chain[0])], ["--private-key", str(chain[1]), "--key-algorithm", "ed25519"]):
        command = ["generate", "a", "-o", str(tmp_path / "a.png"), "--bundle", TINY, "--certificates", str(chain[0])]
        assert main([*command, *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("tiue-runtime: error: credentials: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
