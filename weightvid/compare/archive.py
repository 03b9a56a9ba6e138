"""weightvid's own archives as points of a comparison."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from weightvid.compare.coded import Coded, Decoded
from weightvid.compare.model import Model
from weightvid.compare.prepare import pack_options
from weightvid.compare.settings import Setting
from weightvid.loader import open_archive
from weightvid.pack import pack_checkpoint
from weightvid.summary import summarize_archive


@dataclass(frozen=True, slots=True)
class ArchiveCoder:
    """Packs a checkpoint as ``weightvid pack`` does, and loads it as programs do.

    Attributes
    ----------
    model : Model
    setting : Setting
        Of the kind ``pack``.
    ffmpeg : str or None
        The program of codecs that PyAV lacks.
    calibration : str or None
        Path of the statistics that calibrated settings are packed with.
    """

    model: Model
    setting: Setting
    ffmpeg: str | None = None
    calibration: str | None = None

    @property
    def scales(self) -> bool:
        """Tensors and frames are coded side by side."""
        return True

    def encode(self, jobs: int) -> Coded:
        """Pack.

        Raises
        ------
        WeightvidError
        """
        with tempfile.TemporaryDirectory(prefix="weightvid-") as folder:
            path = Path(folder) / "model.mp4"
            options = pack_options(self.setting, jobs, self.ffmpeg)
            if self.setting.calibrated:
                options = replace(options, calibration=self.calibration)
            pack_checkpoint(self.model.path, path, options)
            about = summarize_archive(path)
            video = about.video
            facts = {"frames": video.frames, "width": video.width, "height": video.height}
            return Coded({"archive": path.read_bytes()}, dict(about.account), about=facts)

    def decode(self, coded: Coded, jobs: int) -> Decoded:
        """Load every tensor, all hashes checked.

        Raises
        ------
        FormatError
        """
        names = self.model.tensors
        stream = io.BytesIO(coded.parts["archive"])
        with open_archive(stream, threads=jobs, check_tensors=True) as archive:
            return Decoded({name: array for name, array in archive if name in names})
