"""Speech from text: the same samples whatever was spoken before, and what is said of wrong arguments."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from leapformer.errors import LeapformerError, MissingExtra

pytest.importorskip("espeakng_loader")

from leapformer.tasks.simulst.corpora import espeak  # noqa: E402
from leapformer.tasks.simulst.corpora.espeak import speak  # noqa: E402

TEXT = "The car costs 12,000 euros at 9:15."


def test_speech_is_16_bit_and_of_the_expected_length():
    samples = speak(TEXT)
    assert samples.dtype == np.int16 and samples.ndim == 1
    assert 2.0 < len(samples) / espeak.SAMPLE_RATE < 5.0
    assert 5_000 < np.abs(samples.astype(int)).max() <= 32_768
    assert not samples[-5:].any()  # it is spoken to its end


@pytest.mark.parametrize("voice", ["en-us", "en-gb-scotland+f3", "en+klatt2", "en-us+whisper"])
def test_what_was_spoken_before_changes_nothing(voice):
    first = speak(TEXT, voice=voice)
    speak("Something else, which is longer than the other one.", voice="en-gb-x-rp+m2", speed=250, pitch=80)
    np.testing.assert_array_equal(speak(TEXT, voice=voice), first)


def test_another_process_speaks_the_same():
    program = (
        "import hashlib; from leapformer.tasks.simulst.corpora.espeak import speak; speak('Hello.', voice='en+m5')\n"
    )
    program += f"print(hashlib.sha256(speak({TEXT!r}, voice='en-us+f2', speed=160).tobytes()).hexdigest())"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == hashlib.sha256(speak(TEXT, voice="en-us+f2", speed=160).tobytes()).hexdigest()


def test_voices_speed_and_pitch_change_the_sound():
    spoken = [speak(TEXT, voice=voice).tobytes() for voice in ("en-us", "en", "en-us+f3", "en-us+m3", "en-us+Annie")]
    spoken.append(speak(TEXT, pitch=80).tobytes())
    assert len(set(spoken)) == len(spoken)
    assert len(speak(TEXT, speed=250)) < 0.8 * len(speak(TEXT, speed=150))


def test_text_is_utf_8_and_digits_are_numbers():
    assert len(speak("Grüße aus Köln", voice="de")) > 10_000
    assert speak("café").tobytes() != speak("caf").tobytes()
    # A number takes about as long as its words.
    assert abs(len(speak("350 euros")) - len(speak("three hundred fifty euros"))) < 3_000


def test_the_lists_of_voices_and_variants():
    assert {"en", "en-us", "en-gb-scotland", "de", "fr"} <= set(espeak.voices())
    assert {"f1", "m3", "Annie"} <= set(espeak.variants())
    assert espeak.version().startswith("1.")


def test_wrong_arguments():
    for text in ("", "...", "\n \t", "a\0b"):
        with pytest.raises(LeapformerError, match="espeak: expected text to speak, found"):
            speak(text)
    for voice in ("xx", "en-us+nobody", "", "en-us+../../lang/gmw/de", "../en"):
        with pytest.raises(LeapformerError, match="espeak: expected a voice such as en-us"):
            speak("Hello.", voice=voice)
    with pytest.raises(ValueError, match="expected a speed of 80 to 450 and a pitch of 0 to 100, got 20 and 50"):
        speak("Hello.", speed=20)
    with pytest.raises(ValueError, match="got 175 and 101"):
        speak("Hello.", pitch=101)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtra, match=r"espeakng_loader.*leapformer\[espeak\]"):
        speak("Hello.")


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    import espeakng_loader

    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(tmp_path / "broken.so"))
    with pytest.raises(LeapformerError, match="espeak: cannot load .*broken.so") as caught:
        speak("Hello.")
    assert "\n" not in str(caught.value)


def test_data_in_too_deep_a_folder(monkeypatch, tmp_path):
    """Longer names would overflow a buffer of the library."""
    import espeakng_loader

    deep = tmp_path / ("d" * 100) / ("e" * 100)
    for part in ("lang/gmw", "voices/!v"):
        (deep / part).mkdir(parents=True)
    (deep / "lang/gmw/en-US").touch()
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep))
    with pytest.raises(LeapformerError, match="whose name has at most 140 bytes"):
        speak("Hello.")
