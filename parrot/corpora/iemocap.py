"""IEMOCAP: dialogues of 10 speakers in 5 sessions (Busso et al., 2008); its usual 4 classes, 5531 turns.

The labels come from the sessions' evaluation files: neutral, angry, sad, and happy, which takes in excited. Turns
with another label or none are left out, as is custom. A speaker is the session and the turn's F or M (the first F
or M of a name is only that of the dialogue); the sentence is the dialogue's script or scenario.
"""

from __future__ import annotations

import re
from pathlib import Path

from parrot.corpora.base import CorpusError, Problem, Reader, Utterance

EMOTIONS = {"neu": "neutral", "ang": "anger", "sad": "sad", "hap": "happy", "exc": "happy"}
_TURN = re.compile(r"Ses0([1-5])([FM])_((?:impro|script)\w*?)_([FM])(\d{3})")
_LINE = re.compile(r"^\[\d+\.\d+ - \d+\.\d+\]\t(\S+)\t(\w+)\t")


class _IemocapReader(Reader):
    name = "iemocap"
    labels = ("anger", "happy", "neutral", "sad")
    counts = {"anger": 1103, "happy": 1636, "neutral": 1708, "sad": 1084}  # noqa: RUF012 (read only)

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        evaluations = sorted(root.glob("Session[1-5]/dialog/EmoEvaluation/Ses*.txt"))
        evaluations = [path for path in evaluations if not path.name.startswith(".")]
        if not evaluations:
            found = sorted(p.name for p in root.iterdir())[:5] if root.is_dir() else []
            raise CorpusError(
                self.name, root,
                ["no Session1/dialog/EmoEvaluation/Ses01F_impro01.txt or the like: give the folder that holds "
                 f"Session1 to Session5; found {', '.join(found) or 'nothing'}"],
            )  # fmt: skip
        utterances, problems = [], []
        for evaluation in evaluations:
            session = evaluation.parents[2]
            for line in evaluation.read_text(encoding="utf-8", errors="replace").splitlines():
                found = _LINE.match(line)
                if not found or found[2] not in EMOTIONS:
                    continue
                turn = _TURN.fullmatch(found[1])
                if turn is None:
                    problems.append(Problem("misnamed", evaluation.name, f"not a turn of IEMOCAP: {found[1]!r}"))
                    continue
                path = session / "sentences" / "wav" / evaluation.stem / f"{found[1]}.wav"
                if not path.is_file():
                    problems.append(Problem("missing", str(path.relative_to(root)), "no such file"))
                    continue
                utterances.append(Utterance(path, turn[1] + turn[4], EMOTIONS[found[2]], turn[3]))
        return sorted(utterances, key=lambda u: u.path.name), problems


READER = _IemocapReader()
