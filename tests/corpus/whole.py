"""What a corpus holds, read as a whole."""

import pyarrow as pa

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import SCHEMA, iter_attempts, iter_images


def attempts_of(corpus: Corpus) -> pa.Table:
    """Every row of every finished shard."""
    return pa.concat_tables([SCHEMA.empty_table(), *iter_attempts(corpus)])


def images_of(corpus: Corpus) -> pa.Table:
    """The images that the corpus wants and has, in list order."""
    parts = list(iter_images(corpus))
    return pa.concat_tables(parts).sort_by("row") if parts else SCHEMA.empty_table()
