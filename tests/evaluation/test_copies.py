"""What an evaluation shares with the training set of what it evaluates."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from imagerag.evaluation.copies import measure_leakage
from imagerag.evaluation.results import Leakage
from imagerag.retrieval.config import IndexConfig
from imagerag.retrieval.index import build_index
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.storage.keyed_table import KeyedTable
from tests.evaluation.test_prompts import training_set
from tests.retrieval.rows import DIM, ENCODER, append, fixed_size_lists, make_rows, png


def test_prompts_and_pictures_that_were_learnt_from_are_counted(tmp_path: Path) -> None:
    pictures = {
        "cup": (0, 0, 0),
        "mug": (0, 0, 0),
        "harp": (90, 0, 0),
        "lyre": (93, 3, 3),
        "tree ": (0, 250, 0),
        "fish": (0, 0, 250),
        "boat": (0, 0, 250),
        "moon": (250, 250, 0),
    }
    learnt = ["mug", "lyre", "tree ", "moon"]
    alike = np.repeat(np.eye(DIM, dtype=np.float32)[:4], 2, axis=0)  # each is next to one of the others
    rows = make_rows(
        0,
        len(pictures),
        caption=list(pictures),
        image=[png(colour) for colour in pictures.values()],
        image_embed=fixed_size_lists(alike),
    )
    store = Store(str(tmp_path), "images")
    store.create(ENCODER)
    append(store, rows)
    version = build_index(store, IndexConfig()).version
    examples = KeyedTable.of(
        str(tmp_path), "references", {}, [pa.field("prompt", pa.string()), pa.field("is_held_out", pa.bool_())]
    )
    is_held_out = [caption not in learnt for caption in pictures]
    examples.append(
        pa.table({"id": rows["id"], "prompt": list(pictures), "is_held_out": is_held_out}, schema=examples.schema)
    )
    prompts = ("cup", "harp", "tree", "fish", "star")
    retriever = Retriever(str(tmp_path), "images", version=version)
    assert measure_leakage(retriever, prompts, training_set(examples.table_uri)) == Leakage(
        num_prompts_in_index=4,
        num_prompts_learnt=1,  # tree
        num_images=4,
        num_images_learnt=1,  # that of cup, as a mug; that of fish is held out as a boat
        num_near_duplicates=2,  # those of cup and harp
    )
    nothing = measure_leakage(retriever, ("star",), training_set(examples.table_uri))
    assert (nothing.num_images, nothing.num_near_duplicates) == (0, 0)
