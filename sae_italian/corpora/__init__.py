"""Italian corpora: the catalogue, local files, MicroItaliano, held-out splits, packing into contexts."""

from sae_italian.corpora.documents import Split, TextDocument, is_held_out, iter_documents, load_corpus
from sae_italian.corpora.packing import PackedBlock, pack

__all__ = ["PackedBlock", "Split", "TextDocument", "is_held_out", "iter_documents", "load_corpus", "pack"]
