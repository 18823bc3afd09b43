"""Text to speech with espeak-ng, through the library that the package `espeakng-loader` carries; no network, no sound
card.

espeak-ng is under the GPL-3: it is an extra of its own, and what it speaks is no derived work of it.

The library keeps state between utterances that nothing resets (flutter, noise, the phase of the wave), so that the same
text would sound a little different after another. It is therefore loaded anew for each utterance, which takes a tenth
of the time of speaking it: the samples depend on the arguments alone, whoever speaks them and in what order.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from leapformer.errors import LeapformerError, MissingExtra

SAMPLE_RATE = 22_050
SPEEDS = (80, 450)  # words a minute that espeak-ng knows

_SYNCHRONOUS = 2  # output mode: the samples go to the callback, and there is no thread
_DONT_EXIT = 0x8000  # otherwise a missing data folder ends the process
_RATE, _PITCH = 1, 3
_UTF8 = 1
_SEED = 1
_LONGEST_DATA_PATH = 140  # a buffer of 160 bytes, in which names of files are put behind it
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_LOCK = threading.Lock()  # the library has one state for the whole process


def speak(text: str, *, voice: str = "en-us", speed: int = 175, pitch: int = 50) -> np.ndarray:
    """The samples of a spoken text: int16 [N] at 22,050 Hz.

    Arguments:
        text: of any script that the voice knows; digits are spoken as numbers.
        voice: a language or accent, "+" a variant if wanted: "en-us", "en-gb-scotland+f3", "de+m2"; see `voices` and
            `variants`.
        speed: words a minute, 80 to 450.
        pitch: 0 to 100.

    Raises:
        ValueError: speed or pitch is out of range.
        LeapformerError: no such voice, or nothing of the text can be spoken.
        MissingExtra: espeakng-loader is not installed.
    """
    if not SPEEDS[0] <= speed <= SPEEDS[1] or not 0 <= pitch <= 100:
        raise ValueError(f"speak: expected a speed of 80 to 450 and a pitch of 0 to 100, got {speed} and {pitch}")
    if not any(character.isalnum() for character in text) or "\0" in text:
        raise LeapformerError(f"espeak: expected text to speak, found {text[:40]!r}")
    language, _, variant = voice.partition("+")
    places = _voice_files(str(_data_folder()))
    if language not in places or (variant and variant not in _variant_names(str(_data_folder()))):
        raise LeapformerError(f"espeak: expected a voice such as en-us or en-us+f3, found {voice!r}")
    name = places[language] + (f"+{variant}" if variant else "")
    pieces: list[bytes] = []

    @_CALLBACK
    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    content = text.encode()
    with _LOCK, _library() as library:
        library.espeak_SetSynthCallback(collect)
        library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        _expect(library.espeak_SetVoiceByName(name.encode()), f"voice {voice}")
        _expect(library.espeak_SetParameter(_RATE, speed, 0), f"speed {speed}")
        _expect(library.espeak_SetParameter(_PITCH, pitch, 0), f"pitch {pitch}")
        size = ctypes.c_size_t(len(content) + 1)
        status = library.espeak_Synth(content, size, ctypes.c_uint(0), 1, ctypes.c_uint(0), _UTF8, None, None)
        _expect(status, f"text {text[:40]!r}")
        _expect(library.espeak_Synchronize(), f"text {text[:40]!r}")
    samples = np.frombuffer(b"".join(pieces), dtype=np.int16)
    if not samples.any():
        raise LeapformerError(f"espeak: expected text to speak, found {text[:40]!r}")
    return samples


def version() -> str:
    """The version of espeak-ng: other versions may speak otherwise."""
    with _LOCK, _library() as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return library.espeak_Info(None).decode()


def voices() -> list[str]:
    """Languages and accents, sorted: "en", "en-us", "en-gb-scotland", ...; "en" is British."""
    return sorted(_voice_files(str(_data_folder())))


def variants() -> list[str]:
    """Timbres that can be added to a voice by "+", sorted: "f1", "m3", "Annie", ..."""
    return sorted(_variant_names(str(_data_folder())))


@cache
def _variant_names(folder: str) -> frozenset[str]:
    return frozenset(path.name for path in (Path(folder) / "voices" / "!v").iterdir() if path.is_file())


@cache
def _voice_files(folder: str) -> dict[str, str]:
    """How espeak-ng names the file of each voice: "en-us" is gmw/en-US."""
    languages = Path(folder) / "lang"
    files = (path for path in languages.rglob("*") if path.is_file())
    return {path.name.lower(): path.relative_to(languages).as_posix() for path in files}


def _data_folder() -> Path:
    return Path(_loader().get_data_path())


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError:
        raise MissingExtra("espeak", package="espeakng_loader", purpose="speaking text") from None
    return espeakng_loader


@contextmanager
def _library() -> Iterator[Any]:
    """The library as freshly loaded, and unloaded at the end, with all its state."""
    folder = str(_data_folder())
    if len(folder.encode()) > _LONGEST_DATA_PATH:
        raise LeapformerError(
            f"espeak: expected its data in a folder whose name has at most {_LONGEST_DATA_PATH} bytes, found {folder}"
        )
    path = _loader().get_library_path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise LeapformerError(f"espeak: cannot load {path}: {' '.join(str(error).split())}") from None
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, folder.encode(), _DONT_EXIT)
        if rate != SAMPLE_RATE:
            raise LeapformerError(f"espeak: {folder}: expected {SAMPLE_RATE} samples a second, found {rate}")
        yield library
        library.espeak_Terminate()
    finally:
        _unload(library)


def _unload(library: ctypes.CDLL) -> None:
    import _ctypes

    # Named FreeLibrary on Windows.
    unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary  # type: ignore[attr-defined]
    unload(library._handle)


def _expect(status: int, what: str) -> None:
    if status != 0:
        raise LeapformerError(f"espeak: {what}: expected it to be taken, found error {status}")
