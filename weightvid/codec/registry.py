"""Video codecs that frames of levels can be coded with: one row each.

A row says how to reach the encoder and how to ask it for a mode; :mod:`.pictures` (PyAV) and
:mod:`.program` (the ffmpeg program) do what it says. Archives are coded by those whose ``track``
names a row of :mod:`.tracks` (x265 with settings of its own, in :mod:`.x265`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from weightvid.errors import CodecError

Options = Mapping[str, str]

#: x265's presets, fastest first; x264 and kvazaar have the same. Lossless sizes differ by 0.1 %
#: (tools/results/presets.md).
X265_PRESETS: Final = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
    "placebo",
)  # fmt: skip
X265_PRESET: Final = "ultrafast"


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run an encoder.

    Attributes
    ----------
    options : mapping of str to str
        Encoder options; ``{value}`` stands for the QP, CRF or distance.
    formats : tuple of str
        Pixel formats, the usual one first.
    profiles : mapping of str to str
        Pixel format -> profile of the stream (all-intra).
    values : tuple of float
        Values that span the rates of interest (8-bit samples); empty for lossless.
    limits : tuple of float
        Least and largest value.
    """

    options: Options
    formats: tuple[str, ...]
    profiles: Options = field(default_factory=dict)
    values: tuple[float, ...] = ()
    limits: tuple[float, float] = (0, 0)


@dataclass(frozen=True, slots=True)
class VideoCodec:
    """An encoder, its decoder, and how to ask for what.

    Attributes
    ----------
    name : str
        Ours: ``x265``.
    standard : str
        What it writes: ``HEVC``.
    encoder, decoder : str
        FFmpeg's names.
    backend : str
        ``pyav``: in this process; ``ffmpeg``: by the ffmpeg program.
    modes : mapping of str to Mode
        ``lossless``, ``qp``, ``crf`` or ``distance``.
    presets : tuple of str
        From fast to slow; empty where there is nothing to choose.
    preset : str
        The default one.
    preset_options : mapping of str to str
        Options that choose it; ``{preset}`` stands for the preset.
    common, intra, inter : mapping of str to str
        Options always set, and those of all-intra and of inter coding. Values of one key are
        joined by ``joiner``.
    joiner : str
    predicts : bool
        Whether it can predict a frame from others.
    container : str
        What the stream is usually stored in; ``muxer``: what the ffmpeg program writes to a pipe.
    hardware : str
        Where phones decode it without a program.
    device : str
        What a machine must have to run the encoder; empty for programs.
    track : str
        Which codec of :data:`.tracks.TRACKS` its stream is, as an archive's track; empty where it
        is none.
    unfit : str
        Why it is none.
    folds : bool
        In archives, the dense core of the levels lies beside its pictures; False: on them, because
        it codes what is left, few samples that are not zero, worse than all of them (README.md,
        "Other codecs in archives").
    """

    name: str
    standard: str
    encoder: str
    decoder: str
    backend: str
    modes: Mapping[str, Mode]
    presets: tuple[str, ...] = ()
    preset: str = ""
    preset_options: Options = field(default_factory=dict)
    common: Options = field(default_factory=dict)
    intra: Options = field(default_factory=dict)
    inter: Options = field(default_factory=dict)
    joiner: str = ":"
    predicts: bool = False
    container: str = "mp4"
    muxer: str = "nut"
    hardware: str = "no phone"
    device: str = ""
    track: str = ""
    unfit: str = ""
    folds: bool = True


@dataclass(frozen=True, slots=True)
class Coding:
    """One setting of one codec.

    Attributes
    ----------
    codec : VideoCodec
    mode : str
    value : float or None
        QP, CRF or distance; None for lossless.
    preset : str
    pixel_format : str
    inter : bool
        Predict frames from the ones before.
    """

    codec: VideoCodec
    mode: str = "lossless"
    value: float | None = None
    preset: str = ""
    pixel_format: str = ""
    inter: bool = False

    def __post_init__(self) -> None:
        codec = self.codec
        mode = codec.modes.get(self.mode)
        if mode is None:
            known = ", ".join(codec.modes)
            raise CodecError(f"{codec.name} has no mode {self.mode!r}; it has: {known}")
        chosen = self.pixel_format or mode.formats[0]
        preset = self.preset or codec.preset
        if chosen not in mode.formats:
            raise CodecError(
                f"{codec.name} {self.mode} takes {', '.join(mode.formats)}, not {chosen}"
            )
        if preset not in (codec.presets or ("",)):
            raise CodecError(
                f"{codec.name} has no preset {preset!r}{suggestion(preset, codec.presets)}"
            )
        if (self.value is None) != (self.mode == "lossless"):
            raise CodecError(f"{codec.name} {self.mode}: a value belongs to lossy modes alone")
        if self.value is not None and not mode.limits[0] <= self.value <= mode.limits[1]:
            low, high = mode.limits
            raise CodecError(
                f"{codec.name}: {self.mode} goes from {low:g} to {high:g}, not {self.value:g}"
            )
        if self.inter and not codec.predicts:
            raise CodecError(f"{codec.name} codes every frame alone; it has no inter mode")
        object.__setattr__(self, "pixel_format", chosen)
        object.__setattr__(self, "preset", preset)

    @property
    def options(self) -> dict[str, str]:
        """Encoder options, complete."""
        codec, found = self.codec, dict[str, str]()
        gop = codec.inter if self.inter else codec.intra
        value = "" if self.value is None else f"{self.value:g}"
        for part in (codec.common, codec.preset_options, codec.modes[self.mode].options, gop):
            for key, text in part.items():
                filled = text.replace("{value}", value).replace("{preset}", self.preset)
                found[key] = f"{found[key]}{codec.joiner}{filled}" if key in found else filled
        return found

    @property
    def bits(self) -> int:
        """Bits per sample."""
        return bit_depth(self.pixel_format)

    @property
    def profile(self) -> str:
        """Profile that the stream claims; empty where the standard has none."""
        return self.codec.modes[self.mode].profiles.get(self.pixel_format, "")

    @property
    def label(self) -> str:
        """Short name: codec, preset, mode, pixel format where it is not the usual one."""
        usual = self.codec.modes[self.mode].formats[0]
        parts = [self.codec.name, self.preset, self.mode]
        parts += [self.pixel_format] if self.pixel_format != usual else []
        parts += ["inter"] if self.inter else []
        return " ".join(part for part in parts if part)


def bit_depth(pixel_format: str) -> int:
    """Bits per sample of a pixel format.

    Examples
    --------
    >>> bit_depth("yuv420p"), bit_depth("gray12le")
    (8, 12)
    """
    return 12 if pixel_format.endswith("12le") else 10 if pixel_format.endswith("10le") else 8


def suggestion(wrong: str, known: tuple[str, ...]) -> str:
    """The end of a message about an unknown name.

    Examples
    --------
    >>> suggestion("x256", ("x264", "x265", "png"))
    '; did you mean x265?'
    >>> suggestion("?", ("x264", "x265"))
    '; known: x264, x265'
    """
    near = get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def codec(name: str) -> VideoCodec:
    """Row of a name.

    Raises
    ------
    CodecError
        Unknown name; the nearest one is suggested.
    """
    found = CODECS.get(name)
    if found is None:
        raise CodecError(f"unknown codec {name!r}{suggestion(name, tuple(CODECS))}")
    return found


_QP: Final = (8.0, 14.0, 20.0, 26.0, 32.0)
_CRF: Final = (4.0, 10.0, 16.0, 22.0, 28.0)
_SIDES: Final = ("yuv420p", "yuv420p10le", "yuv420p12le", "gray", "gray10le", "gray12le")
_REXT: Final = "HEVC Range Extensions"
_HEVC_PROFILES: Final = {
    "yuv420p": "HEVC Main", "yuv420p10le": "HEVC Main 10", "yuv420p12le": _REXT,
    "gray": _REXT, "gray10le": _REXT, "gray12le": _REXT,
}  # fmt: skip
_HEVC_PHONES: Final = "every phone since about 2015 (8-bit 4:2:0; 10-bit: most)"
_AV1_PHONES: Final = "phones since about 2021-2023"
_AVC_PROFILES: Final = {"yuv420p": "H.264 High", "yuv420p10le": "H.264 High 10 Intra"}
_8BIT: Final = {"yuv420p": "HEVC Main"}
_DEVICE_BYTES: Final = "its bytes depend on device and driver, and none was tried in an archive"

#: keyint=2 and forced IDR pictures: keyint=1 would signal Range Extensions (see x265.py).
_X265: Final = "info=0:log-level=none:pools=none:wpp=0:frame-threads=1:bframes=0:no-sao=1"
_X265_INTRA: Final = "keyint=2:min-keyint=1:open-gop=0:scenecut=0:rc-lookahead=0"
_X265_INTER: Final = "keyint=-1:scenecut=0:ref=3:me=star:merange=57"
#: the codec's own decisions about what an eye would miss are of no use to weights.
_X265_LOSSY: Final = "aq-mode=0:cutree=0:psy-rd=0:psy-rdoq=0:rdoq-level=2:ipratio=1:cu-lossless=0"

_ROWS: Final = (
    VideoCodec(
        "x265", "HEVC", "libx265", "hevc", "pyav",
        {
            "lossless": Mode({"x265-params": "lossless=1"}, _SIDES, _HEVC_PROFILES),
            "qp": Mode({"x265-params": f"{_X265_LOSSY}:qp={{value}}"}, _SIDES, _HEVC_PROFILES,
                       _QP, (0, 51)),
            "crf": Mode({"x265-params": f"{_X265_LOSSY}:crf={{value}}"}, _SIDES, _HEVC_PROFILES,
                        _CRF, (0, 51)),
        },
        X265_PRESETS, X265_PRESET, {"preset": "{preset}"},
        {"x265-params": _X265, "forced-idr": "1"},
        {"x265-params": _X265_INTRA}, {"x265-params": _X265_INTER},
        predicts=True, hardware=_HEVC_PHONES, track="hevc",
    ),
    VideoCodec(
        "x264", "H.264", "libx264", "h264", "pyav",
        {
            "lossless": Mode({"qp": "0"}, ("yuv420p", "gray"),
                             {"yuv420p": "H.264 High 4:4:4 Intra"}),
            "qp": Mode({"qp": "{value}", "x264-params": "ipratio=1"},
                       ("yuv420p", "yuv420p10le", "gray", "gray10le"),
                       _AVC_PROFILES, _QP, (1, 51)),
            "crf": Mode({"crf": "{value}"}, ("yuv420p", "yuv420p10le", "gray", "gray10le"),
                        _AVC_PROFILES, _CRF, (1, 51)),
        },
        X265_PRESETS, "medium", {"preset": "{preset}"},
        {"bf": "0", "x264-params": "log-level=none", "aq-mode": "0", "psy": "0"},
        predicts=True, hardware="every phone (High; lossless: none)", track="avc",
    ),
    VideoCodec(
        "svtav1", "AV1", "libsvtav1", "libdav1d", "pyav",
        {
            "lossless": Mode({"svtav1-params": "lossless=1"}, ("yuv420p",),
                             {"yuv420p": "AV1 Main"}),
            "qp": Mode({"svtav1-params": "rc=0:aq-mode=0:qp={value}"},
                       ("yuv420p", "yuv420p10le"),
                       {"yuv420p": "AV1 Main", "yuv420p10le": "AV1 Main"},
                       (5, 13, 22, 32, 43), (1, 63)),
            "crf": Mode({"svtav1-params": "rc=0:aq-mode=2:qp={value}"},
                        ("yuv420p", "yuv420p10le"),
                        {"yuv420p": "AV1 Main", "yuv420p10le": "AV1 Main"},
                        (5, 13, 22, 32, 43), (1, 63)),
        },
        tuple(str(n) for n in range(12, -1, -1)), "8", {"preset": "{preset}"},
        {"svtav1-params": "pred-struct=1:lp=1"},
        predicts=True, hardware=_AV1_PHONES, track="av1", folds=False,
    ),
    VideoCodec(
        "vp9", "VP9", "libvpx-vp9", "vp9", "pyav",
        {
            "lossless": Mode({"lossless": "1"}, ("yuv420p",), {"yuv420p": "VP9 Profile 0"}),
            "qp": Mode({"crf": "{value}", "qmin": "{value}", "qmax": "{value}", "b": "0"},
                       ("yuv420p",), {"yuv420p": "VP9 Profile 0"}, (4, 12, 22, 32, 43), (0, 63)),
        },
        tuple(str(n) for n in range(8, -1, -1)), "4", {"cpu-used": "{preset}"},
        {"auto-alt-ref": "0", "lag-in-frames": "0", "deadline": "good"},
        predicts=True, container="webm", hardware="most phones", track="vp9", folds=False,
    ),
    VideoCodec("ffv1", "FFV1", "ffv1", "ffv1", "pyav",
               {"lossless": Mode({"level": "3", "coder": "range_def", "context": "1"},
                                 ("gray", "yuv420p"))}, container="matroska", track="ffv1"),
    VideoCodec("jpegls", "JPEG-LS", "jpegls", "jpegls", "pyav",
               {"lossless": Mode({}, ("gray",))}, container="matroska",
               unfit="no sample entry of an MP4 is registered for JPEG-LS"),
    VideoCodec("jpeg2000", "JPEG 2000", "jpeg2000", "jpeg2000", "pyav",
               {"lossless": Mode({"pred": "dwt53", "format": "j2k"}, ("gray",))},
               track="jpeg2000", folds=False),
    VideoCodec("png", "PNG", "png", "png", "pyav",
               {"lossless": Mode({"pred": "mixed"}, ("gray",))}, container="matroska",
               hardware="every phone (in software)", track="png", folds=False),
    VideoCodec(
        "nvenc", "HEVC", "hevc_nvenc", "hevc", "pyav",
        {
            "lossless": Mode({"tune": "lossless"}, ("yuv420p",), _8BIT),
            "qp": Mode({"rc": "constqp", "qp": "{value}"}, ("yuv420p",), _8BIT, _QP, (0, 51)),
        },
        tuple(f"p{n}" for n in range(1, 8)), "p4", {"preset": "{preset}"}, {"bf": "0"},
        {"forced-idr": "1"}, predicts=True, hardware=_HEVC_PHONES, device="an NVIDIA GPU",
        unfit=_DEVICE_BYTES,
    ),
    VideoCodec(
        "videotoolbox", "HEVC", "hevc_videotoolbox", "hevc", "pyav",
        {"qp": Mode({"q:v": "{value}"}, ("yuv420p",), _8BIT, (90, 75, 60, 45, 30), (1, 100))},
        predicts=True, hardware=_HEVC_PHONES, device="an Apple computer",
        unfit=_DEVICE_BYTES,
    ),
    VideoCodec(
        "aom", "AV1", "libaom-av1", "libdav1d", "ffmpeg",
        {
            "lossless": Mode({"aom-params": "lossless=1", "crf": "0"}, ("yuv420p", "gray"),
                             {"yuv420p": "AV1 Main", "gray": "AV1 Main"}),
            "qp": Mode({"aom-params": "aq-mode=0:deltaq-mode=0", "crf": "{value}",
                        "qmin": "{value}", "qmax": "{value}"},
                       ("yuv420p", "yuv420p10le", "gray"),
                       {"yuv420p": "AV1 Main", "yuv420p10le": "AV1 Main", "gray": "AV1 Main"},
                       (4, 12, 22, 32, 43), (0, 63)),
        },
        tuple(str(n) for n in range(8, -1, -1)), "6", {"cpu-used": "{preset}"},
        {"b:v": "0", "lag-in-frames": "0"}, {"g": "1"}, {"g": "9999"},
        predicts=True, hardware=_AV1_PHONES, track="av1", folds=False,
    ),
    VideoCodec(
        "vvenc", "VVC", "libvvenc", "vvc", "ffmpeg",
        {"qp": Mode({"qp": "{value}", "qpa": "0"}, ("yuv420p10le",),
                    {"yuv420p10le": "VVC Main 10"}, _QP, (0, 63))},
        ("faster", "fast", "medium", "slow", "slower"), "faster", {"preset": "{preset}"},
        {"threads": "1"}, {"g": "1"}, {"g": "9999"},
        predicts=True, muxer="vvc", track="vvc", folds=False,
    ),
    VideoCodec("jxl", "JPEG XL", "libjxl", "libjxl", "ffmpeg",
               {
                   "lossless": Mode({"distance": "0", "modular": "1"}, ("gray",)),
                   "distance": Mode({"distance": "{value}"}, ("gray",), {},
                                    (0.1, 0.3, 0.8, 2, 5), (0.01, 15)),
               },
               tuple(str(n) for n in range(1, 10)), "7", {"effort": "{preset}"},
               container="none", muxer="image2pipe",
               unfit="no sample entry of an MP4 is registered for JPEG XL; PyAV has no decoder"),
    VideoCodec(
        "kvazaar", "HEVC", "libkvazaar", "hevc", "ffmpeg",
        {
            "lossless": Mode({"kvazaar-params": "lossless=1"}, ("yuv420p",),
                             {"yuv420p": "HEVC Main"}),
            "qp": Mode({"kvazaar-params": "qp={value},intra-qp-offset=0"}, ("yuv420p",), _8BIT,
                       _QP, (0, 51)),
        },
        X265_PRESETS, "ultrafast", {"kvazaar-params": "preset={preset}"},
        {"kvazaar-params": "threads=0,owf=0,wpp=0,info=0,gop=0"},
        {"kvazaar-params": "period=1"}, {"kvazaar-params": "period=0"}, ",",
        predicts=True, hardware=_HEVC_PHONES, track="hevc",
    ),
    VideoCodec(
        "rav1e", "AV1", "librav1e", "libdav1d", "ffmpeg",
        {"qp": Mode({"qp": "{value}"}, ("yuv420p", "yuv420p10le"),
                    {"yuv420p": "AV1 Main", "yuv420p10le": "AV1 Main"},
                    (10, 40, 80, 120, 160), (1, 255))},
        tuple(str(n) for n in range(10, -1, -1)), "8", {"speed": "{preset}"},
        {"rav1e-params": "low_latency=true"}, {"g": "1"}, {"g": "9999"},
        predicts=True, hardware=_AV1_PHONES, track="av1", folds=False,
    ),
)  # fmt: skip

#: every codec, by name.
CODECS: Final[Mapping[str, VideoCodec]] = MappingProxyType({row.name: row for row in _ROWS})
