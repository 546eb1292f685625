"""Italian corpora: the catalogue, hub and local files, MicroItaliano, held-out splits, filters, packing into contexts."""

from sae_italian.corpora.packing import PackedBlock, pack
from sae_italian.corpora.rows import is_held_out
from sae_italian.corpora.stream import CorpusStream, Reader, Split, TextDocument, iter_documents, load_corpus

__all__ = [
    "CorpusStream",
    "PackedBlock",
    "Reader",
    "Split",
    "TextDocument",
    "is_held_out",
    "iter_documents",
    "load_corpus",
    "pack",
]
