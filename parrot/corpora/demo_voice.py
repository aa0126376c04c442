"""Worker program of the demo corpus: speaks sentences with Praat's speech synthesiser (espeak-ng).

The only file that imports praat-parselmouth (GPL-3). It is run as a program of its own, never imported:
the synthesiser keeps random state from one utterance to the next, so only a fresh process that speaks a
fixed list gives the same samples every time.

Standard input: a JSON list of requests with the keys ``language``, ``voice``, ``text``, ``sample_rate``,
``pitch``, ``pitch_range`` (multipliers) and ``words_per_minute``. Standard output: for each request the
number of samples (little-endian int64), then the samples (little-endian float32).
"""

from __future__ import annotations

import json
import struct
import sys

WORD_GAP = 0.01  # seconds


def main() -> None:
    from parselmouth.praat import call

    for request in json.load(sys.stdin):
        synthesizer = call("Create SpeechSynthesizer", request["language"], request["voice"])
        manner = [request[key] for key in ("pitch", "pitch_range", "words_per_minute")]
        call(synthesizer, "Speech output settings", request["sample_rate"], WORD_GAP, *manner, "IPA")
        sounds = call(synthesizer, "To Sound", request["text"], "no")
        sound = sounds[0] if isinstance(sounds, list) else sounds
        samples = sound.values[0].astype("<f4")
        sys.stdout.buffer.write(struct.pack("<q", samples.size) + samples.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
