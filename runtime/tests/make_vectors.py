"""Make data/vectors: what the Python runtime computes, for readers in other languages to compare with.

python make_vectors.py

The runtime for JavaScript (runtime/web) and the tests in Python read the same files. float32 values are written as the
integers of their 32 bits, so that a comparison is exact.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle
from tiue_runtime.metadata import options_for
from tiue_runtime.noise import gaussian
from tiue_runtime.options import LESSONS
from tiue_runtime.record import Record
from tiue_runtime.tokenizer import PromptTokenizer
from tiue_runtime.vocabulary import Vocabulary
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

ROOT = Path(__file__).parents[2]
VECTORS = Path(__file__).parent / "data" / "vectors"
TINY = "runtime/tests/data/tiny"
EMOJI = "models/emoji/tiue_emoji"

SEEDS = 0, 1, 2, 7, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 0x0123456789ABCDEF, 2**63, 2**64 - 1
PROMPTS = [
    "",
    "a red heart",
    "A Red HEART",
    "a blue star on the sea",
    "a purple cow",
    "  a \t red\r\nheart  ",
    "heart, star! (sea) a-red_heart it's 3.5%",
    "é è ü ç ñ Å ﬁ ß İ \u0131",
    "Ein ΟΔΥΣΣΕΥΣ im Meer",
    "赤いハート 빨간 하트 قلب أحمر",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\u2764\ufe0f",
    "\U00020000\U0002a6df\U0002f800 \U000e0001",
    "a\x00b\x01c\x1f\x7f\x85\xa0\xad\u200b\u2028\u2029\u3000\ufeff\ufffdz",
    "[CLS] a red [SEP] heart [PAD] [UNK] [MASK] <start> <end>",
]
REPEATED = [  # text, and how often it stands in a prompt
    ("a red heart ", 30),
    ("x", 5000),
    ("\u0301", 300),
    ("red ", 20_000),
    ("the cat sat on the mat with a hat and a bat under the tree by the sea ", 4),
]
# Bundle, prompts, and the options of a request, with JavaScript's names.
REQUESTS: list[tuple[list[str], dict[str, Any]]] = [
    (["a red heart"], {"seed": 1}),
    (["a red heart"], {"seed": 1, "memory": "sequential"}),
    (["a blue star", "the sea"], {"seed": 7, "num_images": 2, "steps": 2}),
    (["a red heart"], {"seed": 2**64 - 1, "height": 16, "width": 4}),
]
RECORDS = [
    Record(
        bundle="tiny",
        bundle_sha256="0f" * 32,
        steps=4,
        height=8,
        width=12,
        memory="parallel",
        vae="kl",
        variant="portable",
        device="wasm",
        provider="CPUExecutionProvider",
        versions={"tiue-runtime": "0.1.0", "onnxruntime-web": "1.30.0"},
        prompt=prompt,
        seed=seed,
        threads=threads,
        prompts=2,
        num_images=3,
        index=5,
        pixels_sha256="ab" * 32,
    )
    for prompt, seed, threads in (
        ("a red heart", 1, None),
        ('quotes " and \\ and <&>, a\nline', 2**64 - 1, 2),
        ("é \U0001f600 \x00\x1f\x7f\u2028", 2**53 + 1, None),
        (None, None, None),
    )
]
COMPLAINTS = [
    "a purple cow",
    "sart",
    "harts and stares",
    "xyzzy",
    "the of a",
    "Stars!",
    "hippopotamus in space",
    "a sunflowr",
    "pissa",
    "",
]


STYLED = [
    ("a red heart", (0, 1, 2, 3, 4, 5, 6, 2**64 - 1)),
    ("A RED HEART, NOTO CLASSIC", (0,)),
    ("pizza slice, flat style", (0,)),
    ("a stylish cat", (1,)),
    ("fluents", (2,)),
    ("in the style_ of", (3,)),
    ("Style", (4,)),
    ("", (0,)),
    ("\U0001f600 !", (0,)),
    ("\u8d64\u3044\u30cf\u30fc\u30c8", (5,)),
]


def bits(values: Any) -> list[int]:
    """Return the bits of float32 values, in row-major order."""
    return np.asarray(values, dtype=np.float32).ravel().view(np.uint32).tolist()


def sha256(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def noise() -> list[dict[str, Any]]:
    cases = []
    for seed in SEEDS:
        values = gaussian(seed, (4, 64, 64))
        cases.append({"seed": str(seed), "count": values.size, "first": bits(values)[:8], "sha256": sha256(values)})
    return cases


def tokens() -> list[dict[str, Any]]:
    cases = []
    for bundle in (TINY, EMOJI):
        length = Bundle.load(ROOT / bundle).manifest.text_length
        tokenizer = PromptTokenizer(ROOT / bundle / "tokenizer.json", length)
        for prompt, times in [*((prompt, 1) for prompt in PROMPTS), *REPEATED]:
            made = tokenizer([prompt * times])
            ids, mask = made.input_ids[0].tolist(), made.attention_mask[0].tolist()
            about = {"bundle": bundle, "length": length, "prompt": prompt, "times": times}
            cases.append({**about, "ids": ids, "mask": mask, "cut": bool(made.cut[0])})
    return cases


def schedules() -> list[dict[str, Any]]:
    cases = []
    for bundle in (TINY, EMOJI):
        manifest = Bundle.load(ROOT / bundle).manifest
        for steps, schedule in manifest.schedules.items():
            weights = {"noise_weight": bits(schedule.noise_weight)[0], "step_weights": bits(schedule.step_weights)}
            cases.append({"bundle": bundle, "steps": steps, "rows": list(manifest.step_rows(steps)), **weights})
    return cases


def pictures() -> list[dict[str, Any]]:
    pipe = Pipeline.load(ROOT / TINY, device="cpu")
    cases = []
    for prompts, options in REQUESTS:
        result = pipe(prompts, **options)
        latents = pipe(prompts, output_type="latent", **options).images
        previews: list[str] = []
        pipe(
            prompts,
            callback=lambda p, made=previews: made.append(p.preview().tobytes().hex() if p.latents is not None else ""),
            **options,
        )
        cases.append(
            {
                "bundle": TINY,
                "prompts": prompts,
                "options": {key: str(value) if key == "seed" else value for key, value in options.items()},
                "seeds": [str(seed) for seed in result.seeds],
                "shape": latents.shape,
                "latents": bits(latents),
                "size": result.images[0].size,
                "rgb": [image.tobytes().hex() for image in result.images],
                "pixels_sha256": [record.pixels_sha256 for record in (image.record for image in result.images)],
                "previews": previews,
            }
        )
    return cases


def records() -> list[dict[str, Any]]:
    cases = []
    for record in RECORDS:
        fields = json.loads(record.to_json())
        fields["seed"] = None if record.seed is None else str(record.seed)
        cases.append({"record": fields, "json": record.to_json(), "parameters": record.parameters()})
    return cases


def chunks() -> list[dict[str, Any]]:
    cases = []
    for record in RECORDS:
        written = options_for("PNG", record, True)["pnginfo"].chunks
        cases.append({"chunks": [[kind.decode(), data.decode()] for kind, data, *_ in written]})
    return cases


def vocabulary() -> list[dict[str, Any]]:
    cases = []
    for bundle in (TINY, EMOJI):
        known = Vocabulary(Bundle.load(ROOT / bundle).manifest.prompts)
        cases += [{"bundle": bundle, "prompt": prompt, "warning": known.complaint(prompt)} for prompt in COMPLAINTS]
    return cases


def styles() -> list[dict[str, Any]]:
    cases = []
    for bundle in (TINY, EMOJI):
        manifest = Bundle.load(ROOT / bundle).manifest
        for prompt, seeds in STYLED:
            drawn = [{"seed": str(seed), "drawn": manifest.in_style(prompt, seed)} for seed in seeds]
            cases += [{"bundle": bundle, "prompt": prompt, **one} for one in drawn]
    return cases


def removed(character: str, **options: bool) -> bool:
    """Say whether BERT's normalizer removes a character. options: of the normalizer; all others are off."""
    off = dict.fromkeys(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), False)
    return BertNormalizer(**{**off, **options}).normalize_str(f"a{character}b") == "ab"


# The sets of characters in which BERT's tokenizer depends on a version of Unicode: the library's own, which is old.
CHARACTERS: dict[str, Callable[[str], bool]] = {
    "control": lambda character: removed(character, clean_text=True),
    "mark": lambda character: removed(character, strip_accents=True),
    "punctuation": lambda character: len(BertPreTokenizer().pre_tokenize_str(f"a{character}b")) == 3,
}


def characters() -> list[dict[str, Any]]:
    cases = []
    for name, belongs in CHARACTERS.items():
        codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and belongs(chr(code))]
        ranges: list[list[int]] = []
        for code in codes:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
        cases.append({"set": name, "ranges": ranges})
    return cases


def lessons() -> list[dict[str, Any]]:
    return [{"name": name, "lesson": lesson} for name, lesson in LESSONS.items()]


FILES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "noise.json": noise,
    "tokens.json": tokens,
    "schedules.json": schedules,
    "pictures.json": pictures,
    "records.json": records,
    "chunks.json": chunks,
    "vocabulary.json": vocabulary,
    "styles.json": styles,
    "characters.json": characters,
    "lessons.json": lessons,
}


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    for name, make in FILES.items():
        lines = ",\n".join(json.dumps(case) for case in make())
        (VECTORS / name).write_text(f"[\n{lines}\n]\n", encoding="ascii")
