"""Which latents detect linguistic labels of annotated words, and which belong to one language."""

from sae_italian.analysis.probes.detect import Detection, Task
from sae_italian.analysis.probes.report import Probes, probe
from sae_italian.analysis.probes.treebank import Sentence, Treebank, Word, read_treebank
from sae_italian.analysis.probes.words import Words, encode_words, label_names, read_words

__all__ = [
    "Detection",
    "Probes",
    "Sentence",
    "Task",
    "Treebank",
    "Word",
    "Words",
    "encode_words",
    "label_names",
    "probe",
    "read_treebank",
    "read_words",
]
