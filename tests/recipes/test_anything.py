"""Pictures of anything, cut out and varied."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imagerag.embedded.sample import load_drawings
from imagerag.errors import UserError
from imagerag.recipes.tiny_base.anything import Cutouts, vary
from imagerag.recipes.tiny_base.data import Pictures


@pytest.fixture(scope="module")
def drawings() -> Cutouts:
    return Cutouts.of_drawings(Pictures.of(load_drawings(styles=["noto"], splits=["base"])[::40]).pixels)


def test_the_white_around_a_drawing_is_cut_away_and_the_white_in_it_is_not() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="white", outline="red", width=3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (cutout,) = Cutouts.of_drawings(pixels[None]).pixels
    assert cutout[3, 2, 2] == 0
    assert cutout[3, 32, 32] == 255
    assert torch.equal(cutout[:3], pixels)


def test_files_are_kept_whole_in_a_square(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (300, 100), "red")
    ImageDraw.Draw(wide).rectangle((0, 0, 20, 99), fill="aqua")
    (tmp_path / "deep").mkdir()
    wide.save(tmp_path / "deep" / "wide.png")
    Image.new("RGBA", (50, 50)).save(tmp_path / "empty.png")
    Image.new("RGB", (50, 50), "green").save(tmp_path / "plain.png")
    (cutout,) = Cutouts.of_files([tmp_path]).pixels
    assert cutout.shape == (4, 160, 160)
    assert cutout[2, 80, 1] > 200, "the other end"
    assert cutout[0, 80, 157] > 200, "the red end"
    assert cutout[3, 10, 80] == 0, "above it"


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no PNG pictures under {tmp_path}"):
        Cutouts.of_files([tmp_path])


def test_variations_are_pictures_and_the_same_for_the_same_seed(drawings: Cutouts) -> None:
    def made(seed: int) -> torch.Tensor:
        return vary(drawings.pixels, torch.Generator().manual_seed(seed))

    one, same, other = made(0), made(0), made(1)
    assert one.shape == (len(drawings.pixels), 3, 128, 128)
    assert one.min() >= -1
    assert one.max() <= 1
    assert torch.equal(one, same)
    assert (one - other).abs().mean() > 0.1
    assert one.isfinite().all()


def test_grounds_are_mostly_white_and_not_always(drawings: Cutouts) -> None:
    many = drawings.pixels[torch.arange(400) % len(drawings.pixels)]
    corners = vary(many, torch.Generator().manual_seed(0))[:, :, 0, 0]
    assert 0.4 < float((corners > 0.99).all(1).float().mean()) < 0.7
