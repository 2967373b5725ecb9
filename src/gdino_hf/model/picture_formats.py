"""The list of picture formats that are decoded, and how a file's format is recognized by its first bytes."""

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class PictureFormat:
    """A raster format that may be decoded.

    Attributes:
        name: Pillow's name of the format.
        title: Name for messages.
        plugin: Module of Pillow that decodes it; "" for HEIF, which the package pillow-heif decodes.
        suffixes: Usual file name endings, in lower case.
        share: The decoder needs so many times the memory or time per pixel that a picture may have only this part of
            the pixels that others may have.
        speed: Bytes that the decoder reads in a second at least, where the size of a file decides how long it takes.
    """

    name: str
    title: str
    plugin: str
    suffixes: tuple[str, ...]
    share: float = 1.0
    speed: float = math.inf


# Pillow has more decoders. Those left out start other programs (EPS), draw instead of decoding (WMF), parse text in
# Python (XPM, XBM), or belong to other fields (FITS, HDF5, GRIB). A crafted file could attack any of them.
PICTURE_FORMATS = (
    PictureFormat("JPEG", "JPEG", "JpegImagePlugin", (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo")),
    PictureFormat("PNG", "PNG", "PngImagePlugin", (".png", ".apng")),
    PictureFormat("WEBP", "WebP", "WebPImagePlugin", (".webp",), share=0.6),
    PictureFormat("GIF", "GIF", "GifImagePlugin", (".gif",)),
    PictureFormat("BMP", "BMP", "BmpImagePlugin", (".bmp", ".dib")),
    PictureFormat("TIFF", "TIFF", "TiffImagePlugin", (".tif", ".tiff")),
    PictureFormat("AVIF", "AVIF", "AvifImagePlugin", (".avif", ".avifs"), share=0.75, speed=5e6),
    PictureFormat("HEIF", "HEIC", "", (".heic", ".heif", ".hif", ".heics", ".heifs"), 0.75, 5e6),
    PictureFormat("JPEG2000", "JPEG 2000", "Jpeg2KImagePlugin", (".jp2", ".j2k", ".j2c", ".jpc", ".jpx"), 0.25, 2.5e6),
    PictureFormat("PPM", "PPM", "PpmImagePlugin", (".ppm", ".pgm", ".pbm", ".pnm", ".pfm")),
    PictureFormat("TGA", "TGA", "TgaImagePlugin", (".tga", ".icb", ".vda", ".vst")),
    PictureFormat("ICO", "ICO", "IcoImagePlugin", (".ico",)),
    PictureFormat("CUR", "CUR", "CurImagePlugin", (".cur",)),
    PictureFormat("PCX", "PCX", "PcxImagePlugin", (".pcx",)),
    PictureFormat("SGI", "SGI", "SgiImagePlugin", (".sgi", ".rgb", ".rgba", ".bw")),
    PictureFormat("QOI", "QOI", "QoiImagePlugin", (".qoi",), share=0.02),
)
# Plain PPM writes pixels as decimal text, which takes a hundred times the time.
PLAIN_PPM_SHARE = 0.02

FORMAT_NAMES = tuple(each.name for each in PICTURE_FORMATS)
PICTURE_SUFFIXES = tuple(suffix for each in PICTURE_FORMATS for suffix in each.suffixes)
READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, TGA or ICO"

# Bytes of a file's start and end that `picture_format` needs.
START_BYTES = 64
END_BYTES = 26
_TGA_FOOTER = b"TRUEVISION-XFILE"

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\x01\xda", "SGI"),
    (b"qoif", "QOI"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
# Pictures of kinds that are not decoded, so that messages can name them.
_FOREIGN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"%!PS", "an EPS or PostScript drawing"),
    (b"\xc5\xd0\xd3\xc6", "an EPS or PostScript drawing"),
    (b"8BPS", "a Photoshop document"),
    (b"/* XPM */", "an XPM picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"DDS ", "a DDS texture"),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture"),
    (b"#?RADIANCE", "a Radiance HDR picture"),
    (b"SIMPLE  =", "a FITS picture"),
    (b"\xd7\xcd\xc6\x9a", "a WMF drawing"),
    (b"icns", "an ICNS icon"),
    (b"FUJIFILMCCD-RAW", "a camera's raw picture"),
    (b"gimp xcf", "a GIMP document"),
    (b"P7\n", "a PAM picture"),
)
FOREIGN_SUFFIXES = (
    *(".svg", ".svgz", ".eps", ".ps", ".psd", ".xpm", ".xbm", ".jxl", ".dds", ".exr", ".hdr", ".fits", ".wmf", ".emf"),
    *(".icns", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dcm", ".pam", ".jpm", ".pcd"),
)


def picture_format(start: bytes, end: bytes = b"", *, guess: bool = True) -> str | None:
    """Recognize the format of a picture by its content, whatever its file name says.

    Args:
        start: First `START_BYTES` bytes of the file, or more.
        end: Last `END_BYTES` bytes of the file, or more.
        guess: Whether to try the header of old TGA files, which have no signature.

    Returns:
        A name of `FORMAT_NAMES`, or None if it is none of them.
    """
    for signature, name in _STARTS:
        if start.startswith(signature):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        return _boxed_format(start)
    if re.match(rb"P[1-6fF]\s", start):
        return "PPM"
    # A TGA file may begin like an icon, but holds 0 where an icon has the number of its pictures.
    if start[:3] == b"\0\0\1" and start[3:4] == b"\0" and start[4:6] not in (b"", b"\0\0"):
        return "ICO"
    if start[:4] == b"\0\0\2\0" and start[4:6] not in (b"", b"\0\0"):
        return "CUR"
    if _TGA_FOOTER in end[-END_BYTES:] or (guess and _is_tga_header(start)):
        return "TGA"
    if re.match(rb"\x0a[\x00\x02\x03\x05]\x01[\x01\x02\x04\x08]", start):
        return "PCX"
    return None


def foreign_format(start: bytes) -> str | None:
    """Say what kind of picture a file holds that is not in the list, or None if it does not look like a picture."""
    for signature, title in _FOREIGN_STARTS:
        if start.startswith(signature):
            return title
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<!doctype svg")) or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    return None


def decoder(name: str) -> Callable[[Any, str], Image.Image]:
    """Return the function that opens a file of one format of the list; no other plugin of Pillow is imported.

    Args:
        name: A name of `FORMAT_NAMES`.

    Returns:
        A function of an open file and its name.

    Raises:
        ImportError: This format's decoder is not installed; the message says what to install.
    """
    (found,) = [each for each in PICTURE_FORMATS if each.name == name]
    if name == "HEIF":
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            raise ImportError('reading it needs pillow-heif: pip install "gdino-hf[heic]"') from error
        return HeifImageFile
    try:
        importlib.import_module(f"PIL.{found.plugin}")
    except ImportError as error:
        raise ImportError(f"reading {found.title} needs a newer Pillow: pip install -U pillow") from error
    return Image.OPEN[name][0]


def _boxed_format(start: bytes) -> str | None:
    """Return AVIF or HEIF by the brands of an ISO media file, or None for videos."""
    length = int.from_bytes(start[:4], "big")
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, min(length, len(start)), 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS or start[8:12] in (b"mif1", b"msf1") else None


def _is_tga_header(start: bytes) -> bool:
    """Whether the 18 bytes of a TGA header hold possible values."""
    if len(start) < 18 or start[1] > 1 or start[2] not in (1, 2, 3, 9, 10, 11):
        return False
    palette = start[1] == 1
    width, height = int.from_bytes(start[12:14], "little"), int.from_bytes(start[14:16], "little")
    is_indexed = start[2] in (1, 9)
    depths = (8,) if start[2] in (1, 3, 9, 11) else (15, 16, 24, 32)
    fits = start[16] in depths or (start[2] in (3, 11) and start[16] in (1, 16))
    return palette >= is_indexed and width > 0 and height > 0 and fits and not start[17] & 0xC0
