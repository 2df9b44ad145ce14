"""Many pictures in batches: the same ones as one by one."""

import numpy as np
import torch
from PIL import Image

from imagerag.generation.batch import Generated, file_name, generate
from imagerag.generation.pipeline import ImageRAGTurboPipeline


def test_a_picture_depends_on_its_prompt_and_its_seed_alone(plain: ImageRAGTurboPipeline) -> None:
    guided = {"guidance_scale": 3.0, "negative_prompt": "a castle"}
    made = list(generate(plain, ["a fox", "a lion"], [5, 9], batch_size=3, **guided))
    assert [(each.prompt, each.seed) for each in made] == [("a fox", 5), ("a fox", 9), ("a lion", 5), ("a lion", 9)]
    for each in made:
        alone = plain(each.prompt, generator=torch.Generator().manual_seed(each.seed), **guided).images[0]
        difference = np.abs(np.asarray(each.image, int) - np.asarray(alone, int))
        assert difference.max() <= 1


def test_a_file_is_named_by_the_first_words_of_its_prompt() -> None:
    picture = Image.new("RGB", (8, 8))
    assert file_name(3, Generated("A fox / Köln!", 7, picture, ())) == "0003-a-fox-k-ln-seed7.png"
    long = file_name(12, Generated("a very small fox " * 100, 7, picture, ()))
    assert long == "0012-a-very-small-fox-a-very-small-fox-a-very-small-f-seed7.png"
