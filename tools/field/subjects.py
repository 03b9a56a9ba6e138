"""The models of `field.py`, and how each runs: inputs, outputs, and what counts as an answer."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
RATE: Final = 16000
#: answers of a detector without its last step are offsets and log sizes of boxes.
CELLS: Final = 4


class Outputs(NamedTuple):
    """What a model says: numbers that are compared, and answers that are the same or not."""

    values: Array
    answers: list[Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of a package: its checkpoint, and how it runs with other tensors."""

    package: str
    files: tuple[str, ...]
    what: str
    run: Callable[[Path, list[Tensors]], Outputs]


# --- running --------------------------------------------------------------------------------------


def onnx_with(path: Path, tensors: Tensors) -> bytes:
    """An ONNX file whose weights are these; those in Constant nodes, too."""
    model = onnx.load(path)
    places = [(each.name, each) for each in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            places.append((node.output[0], node.attribute[0].t))
    for name, place in places:
        if name in tensors:
            place.CopyFrom(onnx.numpy_helper.from_array(np.array(tensors[name], order="C"), name))
    return bytes(model.SerializeToString())


def session(path: Path, tensors: Tensors) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(
        onnx_with(path, tensors), options, providers=["CPUExecutionProvider"]
    )


def flat(arrays: Sequence[Array]) -> Array:
    return np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in arrays])


# --- inputs ---------------------------------------------------------------------------------------


@lru_cache
def voices(count: int = 6, seconds: float = 9.01) -> Array:
    """Vowels with pauses, noise and gliding pitch, shape (count, samples), in -1..1."""
    random, samples = np.random.default_rng(5), int(seconds * RATE)
    found = []
    for number in range(count):
        time = np.arange(samples) / RATE
        pitch = (90 + 30 * number) * np.exp2(0.3 * np.sin(2 * np.pi * (0.3 + 0.1 * number) * time))
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        sound = np.zeros(samples)
        formants = random.uniform((300, 900, 2200), (800, 2000, 3200), (12, 3))
        for part, tops in enumerate(formants):
            span = slice(part * samples // 12, (part + 1) * samples // 12)
            for harmonic in range(1, 30):
                peak = np.exp(-(((harmonic * pitch[span] - tops[:, None]) / 150) ** 2)).sum(axis=0)
                sound[span] += (peak + 0.02) * np.sin(harmonic * phase[span])
        loud = np.clip(2 * np.sin(2 * np.pi * (0.7 + 0.1 * number) * time) + 0.7, 0, 1)
        sound = sound * loud / np.abs(sound).max() + random.normal(0, 0.002 * 3**number, samples)
        found.append(0.5 * sound / np.abs(sound).max())
    return np.stack(found).astype(np.float32)


@lru_cache
def pictures(size: int, count: int = 4) -> Array:
    """Faces, boxes and words on noise, shape (count, 3, size, size), in 0..1."""
    random, found = np.random.default_rng(6), []
    for _ in range(count):
        low = random.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
        image = Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            x, y, r = random.uniform(0.15, 0.85, 3) * size
            r *= 0.2
            draw.ellipse((x - r, y - 1.3 * r, x + r, y + 1.3 * r), fill=(224, 172, 140))
            for side in (-0.4, 0.4):
                draw.ellipse(
                    (x + side * r - r / 8, y - r / 3, x + side * r + r / 8, y), fill=(30, 20, 20)
                )
            draw.rectangle((x - r / 2, y + r / 2, x + r / 2, y + 0.65 * r), fill=(150, 50, 60))
            font = ImageFont.load_default(size // 10)
            place = tuple(random.uniform(0, 0.7, 2) * size)
            draw.text(
                place, random.choice(list(WORDS)), fill=tuple(random.integers(0, 255, 3)), font=font
            )
        noise = random.normal(0, 6, (size, size, 3))
        found.append((np.asarray(image) + noise).clip(0, 255).transpose(2, 0, 1) / 255)
    return np.stack(found).astype(np.float32)


WORDS: Final = tuple(
    "beautiful better than ugly explicit implicit simple complex complicated flat nested "
    "sparse dense readability counts special cases enough break rules although practicality "
    "beats purity errors should never pass silently unless explicitly silenced face "
    "ambiguity refuse temptation guess there obvious preferably first dutch often right hard "
    "explain idea namespaces honking great more videotape quantizer transformer convolution "
    "neural weights archive decoder picture throughput phonograph zygote rhythm queueing "
    "thorough knightsbridge schadenfreude embedding kubernetes "
    .split()
)  # fmt: skip
KHMER: Final = tuple(
    "ខ្ញុំ ស្រឡាញ់ ភាសា ខ្មែរ សាលា រៀន ផ្ទះ ទឹក បាយ ការ ងារ ប្រទេស កម្ពុជា មនុស្ស ជន កុមារ "
    "គ្រូ សិស្ស សៀវភៅ អាន សរសេរ ទៅ មក ញ៉ាំ ដើរ ថ្ងៃ យប់ ព្រះ អាទិត្យ ខែ ឆ្នាំ ផ្សារ ទិញ លក់ "
    "ល្អ អាក្រក់ ធំ តូច ពណ៌ ក្រហម បៃតង "
    .split()
)  # fmt: skip
NAMES: Final = tuple(
    "محمد أحمد فاطمة عائشة خديجة يوسف إبراهيم عبدالله مصطفى حسين زينب مريم عمر عثمان خالد "
    "سعيد طارق ياسين نورالدين شريف جمال كريم ليلى سلمى هشام رشيد بلال منصور القاسم الزهراني "
    "الحكيم التميمي البغدادي الشهري العتيبي درويش قاضي بوعزيز بنعلي شعبان رمضان غسان إسماعيل "
    "سليمان داوود "
    .split()
)  # fmt: skip


# --- the models -----------------------------------------------------------------------------------


def khmersm(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Where words of Khmer sentences begin."""
    config = json.loads((folder / "khmersm/config.json").read_text(encoding="utf-8"))
    run = session(folder / "khmersm/model.onnx", tensors[0])
    random, values, answers = np.random.default_rng(1), [], []
    for _ in range(30):
        text = "".join(random.choice(KHMER, 12))
        ids = np.array(
            [[config["char2id"].get(c, config["char2id"].get("<unk>", 1)) for c in text]]
        )
        scores = run.run(None, {"x": ids, "mask": np.ones_like(ids, bool)})[0][0]
        values.append(scores)
        answers.append(tuple(scores.argmax(1)))
    return Outputs(flat(values), answers)


def ddddocr(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Words read from noisy pictures."""
    run = session(folder / "ddddocr/common.onnx", tensors[0])
    random, values, answers = np.random.default_rng(2), [], []
    for word in WORDS[:24]:
        image = Image.new("L", (40 + 34 * len(word), 64), 230)
        ImageDraw.Draw(image).text((10, 8), word, fill=60, font=ImageFont.load_default(40))
        grey = np.asarray(image) + random.normal(0, 25, (64, image.width))
        scores = run.run(None, {"input1": (grey / 127.5 - 1).astype(np.float32)[None, None]})[0]
        scores = np.asarray(scores).reshape(-1, np.shape(scores)[-1])
        values.append(scores)
        best = scores.argmax(1)
        answers.append(
            tuple(b for a, b in zip([-1, *best[:-1]], best, strict=True) if b and a != b)
        )
    return Outputs(flat(values), answers)


def g2p_en(_: Path, tensors: list[Tensors]) -> Outputs:
    """Phonemes of words: a recurrent encoder and decoder."""
    t, values, answers = tensors[0], [], []

    def cell(x: Array, h: Array, kind: str) -> Array:
        i, g = (
            x @ t[f"{kind}_w_ih"].T + t[f"{kind}_b_ih"],
            h @ t[f"{kind}_w_hh"].T + t[f"{kind}_b_hh"],
        )
        third = len(h)
        reset, keep = (1 / (1 + np.exp(-(i + g)[a : a + third])) for a in (0, third))
        new = np.tanh(i[2 * third :] + reset * g[2 * third :])
        return np.asarray((1 - keep) * new + keep * h)

    for word in WORDS:
        h = np.zeros(t["enc_w_hh"].shape[1], np.float32)
        for letter in [*(3 + ord(c) - ord("a") for c in word), 2]:
            h = cell(t["enc_emb"][letter], h, "enc")
        spoken = [2]
        while len(spoken) < 20 and spoken[-1] != 3:
            h = cell(t["dec_emb"][spoken[-1]], h, "dec")
            scores = h @ t["fc_w"].T + t["fc_b"]
            if len(spoken) == 1:  # later ones follow other beginnings
                values.append(scores)
            spoken.append(int(scores.argmax()))
        answers.append(tuple(spoken))
    return Outputs(flat(values), answers)


def swift_f0(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Pitch of voices, right within 20 cents."""
    run = session(folder / "swift_f0/model.onnx", tensors[0])
    values, answers = [], []
    for sound in voices():
        low, high = (np.array(hertz, np.float32) for hertz in (46.875, 2093.75))
        pitch, sure = run.run(None, {"audio": sound[None], "fmin": low, "fmax": high})
        cents = 1200 * np.log2(np.maximum(pitch, 1))
        values += [np.where(sure > 0.5, cents / 1200, 0), sure]
        answers += list(
            zip(np.rint(cents / 20).ravel().tolist(), (sure > 0.5).ravel().tolist(), strict=True)
        )
    return Outputs(flat(values), [a if a[1] else None for a in answers])


def lpips(_: Path, tensors: list[Tensors]) -> Outputs:
    """Distances of pictures; features of the right shapes stand for those of VGG."""
    random, values = np.random.default_rng(3), []
    for _turn in range(60):
        score = 0.0
        for weight in tensors[0].values():
            near = random.gamma(0.3, 1, (2, weight.size, 6))
            near /= np.sqrt(np.square(near).sum(axis=1, keepdims=True))
            score += float((weight.reshape(-1) @ np.square(near[0] - near[1])).mean())
        values.append(score)
    return Outputs(np.array(values), [round(v, 2) for v in values])


def silero(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Whether somebody speaks."""
    run = session(folder / "silero_vad/data/silero_vad_16k_sequence.onnx", tensors[0])
    found = []
    for sound in voices():
        padded = np.concatenate([np.zeros(64, np.float32), sound])
        frames = np.stack([padded[a : a + 576] for a in range(0, len(padded) - 576, 512)])
        zero = np.zeros((1, 1, 128), np.float32)
        found.append(run.run(None, {"input": frames, "h": zero, "c": zero})[0])
    every = flat(found)
    return Outputs(every, [bool(p > 0.5) for p in every])


def magika(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Types of files: those of the field's own folder."""
    run = session(folder / "magika/models/standard_v3_3/model.onnx", tensors[0])
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.parent.rglob("*")):
        if path.is_file() and path.stat().st_size > 100:
            kinds.setdefault(path.suffix or path.name, []).append(path)
    values, answers = [], []
    for paths in kinds.values():
        for path in paths[:4]:
            with path.open("rb") as file:
                head = file.read(4096)
                file.seek(max(0, path.stat().st_size - 4096))
                tail = file.read()
            first, last = head.lstrip()[:1024], tail.rstrip()[-1024:]
            codes = [*first, *[256] * (1024 - len(first)), *[256] * (1024 - len(last)), *last]
            scores = run.run(None, {"bytes": np.array([codes], np.int32)})[0][0]
            values.append(scores)
            answers.append(int(scores.argmax()))
    return Outputs(flat(values), answers)


def speechmos(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Mean opinion scores of voices; an answer is a tenth of a point."""
    run = session(folder / "speechmos/dnsmos_models/sig_bak_ovr.onnx", tensors[0])
    found = flat([run.run(None, {"input_1": sound[None, :144160]})[0] for sound in voices()])
    return Outputs(found, np.rint(10 * found).tolist())


def nudenet(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Boxes of every fiftieth anchor, in cells of 8 pixels, and scores of all."""
    run = session(folder / "nudenet/320n.onnx", tensors[0])
    values, answers = [], []
    for picture in pictures(320):
        out = run.run(None, {"images": picture[None]})[0][0]
        values.append(out[4:])
        answers += [tuple(box) for box in np.rint(out[:4, ::50].T / 8).tolist()]
    return Outputs(flat(values), answers)


def det(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Boxes round letters: of every fiftieth anchor, in cells of 8 pixels, and scores of all."""
    run = session(folder / "ddddocr/common_det.onnx", tensors[0])
    values, answers = [], []
    for picture in pictures(416):
        out = run.run(None, {"images": 255 * picture[None]})[0][0]
        values.append(out[:, 4:])
        answers += [tuple(box) for box in np.rint(out[::50, :4] * CELLS).tolist()]
    return Outputs(flat(values), answers)


def resemblyzer(_: Path, tensors: list[Tensors]) -> Outputs:
    """Vectors of voices; the answers are the two voices that are most alike to each."""
    import torch

    state = {name.split("model_state.")[-1]: torch.from_numpy(a) for name, a in tensors[0].items()}
    net = torch.nn.LSTM(40, 256, 3, batch_first=True)
    net.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("lstm.")})
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = np.arange(201) * RATE / 400
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    mels = []
    for sound in voices():
        for first in range(0, len(sound) - 26000, 26000):
            frames = np.stack([sound[a : a + 400] for a in range(first, first + 160 * 160, 160)])
            power = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2
            mels.append(power @ filters.T)
    with torch.inference_mode():
        _, (hidden, _) = net(torch.tensor(np.stack(mels), dtype=torch.float32))
        raw = torch.relu(hidden[-1] @ state["linear.weight"].T + state["linear.bias"])
        vectors = (raw / raw.norm(dim=1, keepdim=True)).numpy()
    alike = vectors @ vectors.T - 2 * np.eye(len(vectors))
    return Outputs(
        flat([vectors]), [tuple(sorted(row)) for row in np.argsort(-alike)[:, :2].tolist()]
    )


def basic_pitch(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Notes that sound."""
    path = folder / "basic_pitch/saved_models/icassp_2022/nmp.onnx"
    run = session(path, tensors[0])
    name, found = run.get_inputs()[0].name, []
    for sound in voices()[:3]:
        found += run.run(None, {name: sound[None, :43844, None]})
    every = flat(found)
    return Outputs(every, (every > 0.5).tolist())


def romanizer(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Names in Latin letters."""
    sys.path.insert(0, str(folder))
    from arabic_name_romanizer.inference import OnnxModel  # type: ignore[import-not-found]

    source = folder / "arabic_name_romanizer/resources"
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for path in source.glob("*.json"):
            (made / path.name).write_bytes(path.read_bytes())
        for kind, own in zip(("encoder", "decoder"), tensors, strict=True):
            (made / f"{kind}.onnx").write_bytes(onnx_with(source / f"{kind}.onnx", own))
        model = OnnxModel(made, intra_op_threads=1)
        found = model.transliterate_units(list(NAMES), None, 1)
    return Outputs(np.array([f[0][1] for f in found]), [f[0][0] for f in found])


def rapidocr(folder: Path, tensors: list[Tensors]) -> Outputs:
    """Where there is text: pixels."""
    path = folder / "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
    run = session(path, tensors[0])
    every = flat([run.run(None, {"x": 2 * p[None] - 1})[0] for p in pictures(320, 3)])
    return Outputs(every, (every > 0.3).tolist())


SUBJECTS: Final = {
    "khmersm": Subject("khmersm", ("khmersm/model.onnx",), "sentences", khmersm),
    "ddddocr": Subject("ddddocr", ("ddddocr/common.onnx",), "words", ddddocr),
    "ddddocr-det": Subject("ddddocr", ("ddddocr/common_det.onnx",), "boxes", det),
    "g2p-en": Subject("g2p-en", ("g2p_en/checkpoint20.npz",), "words", g2p_en),
    "swift-f0": Subject("swift-f0", ("swift_f0/model.onnx",), "frames", swift_f0),
    "lpips": Subject("lpips", ("lpips/weights/v0.1/vgg.pth",), "scores", lpips),
    "silero-vad": Subject(
        "silero-vad", ("silero_vad/data/silero_vad_16k_sequence.onnx",), "frames", silero
    ),
    "magika": Subject("magika", ("magika/models/standard_v3_3/model.onnx",), "files", magika),
    "speechmos": Subject(
        "speechmos", ("speechmos/dnsmos_models/sig_bak_ovr.onnx",), "scores", speechmos
    ),
    "nudenet": Subject("nudenet", ("nudenet/320n.onnx",), "boxes", nudenet),
    "resemblyzer": Subject(
        "resemblyzer", ("resemblyzer/pretrained.pt",), "neighbours", resemblyzer
    ),
    "basic-pitch": Subject(
        "basic-pitch", ("basic_pitch/saved_models/icassp_2022/nmp.onnx",), "notes", basic_pitch
    ),
    "romanizer": Subject(
        "arabic-name-romanizer",
        tuple(f"arabic_name_romanizer/resources/{k}.onnx" for k in ("encoder", "decoder")),
        "names",
        romanizer,
    ),
    "rapidocr-det": Subject(
        "rapidocr-onnxruntime",
        ("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",),
        "pixels",
        rapidocr,
    ),
}
