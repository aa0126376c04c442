"""MESD: 862 single words in Mexican Spanish, 6 emotions (Duville, Alonso-Valerdi and Ibarra-Zarate, 2021).

What the file names tell is limited. 11 people spoke (3 women, 2 men, 6 children), but a name only says which of
these three groups the speaker belongs to. The speaker of an utterance here is therefore the group, "F", "M" or
"C": folds over it are leave-one-group-out, 3 at most, and folds that mix groups share speakers between their
parts. The word leaks too: corpus A has the same 24 words in every emotion and voice, and in corpus B each emotion
has words of its own, so that the word tells the emotion, and most of them come back in other voices.
"""

from __future__ import annotations

import re
from pathlib import Path

from parrot.corpora.base import NamedFilesReader, Utterance

EMOTIONS = {
    "Anger": "anger", "Disgust": "disgust", "Fear": "fear",
    "Happiness": "happy", "Neutral": "neutral", "Sadness": "sad",
}  # fmt: skip
VOICES = ("C", "F", "M")  # child, female, male
NOTE = (
    "the names tell the voice group (C, F, M) and not which of the 11 people speaks: speaker-disjoint folds can be "
    "no more than the 3 groups, and stratified folds share speakers and words between their parts"
)
_NAME = re.compile(r"([A-Z][a-z]+)_([A-Z])_([AB])_([a-z]+(?:_[a-z]+)*)\.wav")

_WORDS_A = """
abajo adios antes arriba ayer basta_ya de_nada delante dentro derecha detras fuera gracias hola hoy izquierda lento
no nunca por_favor pronto rapido si tarde
"""
_MISSING_A = ("Anger_C_A_hoy", "Neutral_C_A_tarde")
_OTHER_WORD_A = {"Sadness_M_A_fuera": "Sadness_M_A_afuera", "Happiness_C_A_lento": "Happiness_C_A_lento_dentro"}
_WORDS_B = """
Anger_C abandono abuso alterado amenazado amenazador ataque atasco catastrofe ceguera condena danino delincuencia
  dificultad disputa enojo estafa estricto explosion explosivo furia humillacion impaciencia injusticia robo
Anger_F abuso amenazado amenazador ataque atasco ceguera conflicto delincuencia enganado estricto explosion
  explosivo furia huracan injusticia insultado ira irrespetuoso monstruoso odioso ofensa pesadilla relajacion
  torturado
Anger_M abandono aguijon amenazado amenazador ansiedad ataque atasco conflicto danza delincuencia desorden
  dificultad disputa encadenado enojo estafa farsa furia hambre huracan impaciencia injusticia ira malevolo
Disgust_C abandono abuso aguijon amenazador arana atasco crisis cucaracha delincuencia estafa furia humillacion
  injusticia insultado irrespetuoso monstruo monstruoso mutilado nausea odioso punalada repulsivo robo suspenso
Disgust_F abandono abuso amenazador arana atasco chistoso conflicto creido cucaracha delincuencia enganado horroroso
  injusticia insultado jeringuilla monstruo monstruoso nausea oloroso oruga punalada relajacion robo torturado
Disgust_M abandono aguijon amenazado arana caprichoso celda cucaracha delincuencia desorden encadenado eructo estafa
  furia metralleta monstruo monstruoso mutilado nausea odioso operacion punalada sangre terrorismo torturado
Fear_C abandono abuso aguijon alarma alterado amenazado amenazador arana catastrofe ceguera cirugia condena
  conflicto cucaracha danino delincuencia desmayo disputa estafa estricto explosion humillacion injusticia robo
Fear_F abuso aguijon alarma amenazado amenazador arana ceguera cirugia conflicto cucaracha delincuencia desmayo
  dificultad enganado estricto explosion explosivo fantasma furia horroroso huracan infarto relajacion tristeza
Fear_M abandono aguijon amenazado amenazador ansiedad arana ataque celda cirugia conflicto cucaracha danza
  delincuencia dificultad encadenado enojo estafa explosion furia huracan imprudente inconciente infarto ira
Happiness_C acogedora aficion aplausos atractivo aventurero baile bebe bello calmado carcajada celebracion chistoso
  cita clavel coordinacion creativo danza delicioso fantastico fresco masaje oasis relax rosa
Happiness_F aficion aglomeracion atractivo aventurero baile bebe bello calma calmado chiminea clavel comico delfin
  delicadeza estudioso fantastico fresco masaje oasis refrescante rosa siesta ternura velas
Happiness_M aficion agua alegria amistad antiguo astuto atractivo aventurero baile bebe broma calma calmado
  confidente ducha ensueno esplendido fresco pelirrojo relajacion respiracion satisfaccion siesta tranquilidad
Neutral_C bola boton colorado congelado delgado elevado escurridizo espacial estrecho extenso ferrocarril hondo
  humedo labrador mecanico mimado mojado pelirrojo rizado robusto rueda seco temporal vapor
Neutral_F acuarela acuatico agencia barba bola caducado conciente contrario desierto elevado extenso fecha garganta
  giro hondo mecanico mentiroso metro mojado paella pelirrojo presumido religioso temporal
Neutral_M abierto agencia alto arroz articulo atomo azulejo babosa bola boton chulo colorado conciente congelado
  delgado desierto despistado escalera escurridizo estacion estrecho extenso fecha ferrocarril
Sadness_C abandono abuso amenazado ataque cansancio catastrofe ceguera condena conflicto danino delincuencia desmayo
  disputa enojo estafa explosion explosivo furia humillacion infarto injusticia robo traicion tristeza
Sadness_F abandono abuso cansancio ceguera conflicto delincuencia desmayo enfriamiento explosion explosivo fracasado
  hambre huracan injusticia insultado llanto metralleta monstruoso mortal nausea odioso ofensa relajacion tristeza
Sadness_M abandono amenazado ansiedad antiguo ataque celda conflicto danza delincuencia dificultad encadenado enojo
  estafa funeraria furia hambre huracan infarto injusticia ira llanto locura metralleta tristeza
"""


def file_names() -> list[str]:
    """The 862 file names of the complete corpus, in order."""
    names = [f"{e}_{v}_A_{word}" for e in EMOTIONS for v in VOICES for word in _WORDS_A.split()]
    names = [_OTHER_WORD_A.get(name, name) for name in names if name not in _MISSING_A]
    for token in _WORDS_B.split():
        if token[0].isupper():
            emotion, voice = token.split("_")
        else:
            names.append(f"{emotion}_{voice}_B_{token}")
    return sorted(f"{name}.wav" for name in names)


def _parse(path: Path) -> Utterance:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not a MESD name, wanted <emotion>_<voice>_<corpus>_<word>.wav such as Anger_F_A_hola.wav")
    emotion, voice, _, word = match.groups()
    for what, code, known in (("emotion", emotion, EMOTIONS), ("voice", voice, VOICES)):
        if code not in known:
            raise ValueError(f"unknown {what} {code!r}, wanted one of {', '.join(known)}")
    return Utterance(path, voice, EMOTIONS[emotion], word)


READER = NamedFilesReader(
    name="mesd",
    title="MESD",
    folders=("Mexican Emotional Speech Database (MESD)", "."),
    example="Anger_F_A_hola.wav",
    parse=_parse,
    labels=tuple(sorted(EMOTIONS.values())),
    names=file_names,
    note=NOTE,
)
