"""The statement in a picture's file that it is generated, and from what."""

import io
from xml.etree import ElementTree

from PIL import Image

from imagerag.generation.references import Reference
from imagerag.generation.sheet import to_png
from imagerag.generation.xmp import COMPOSITE, GENERATED, to_xmp

NAMES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "ext": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}


def read_back(*references: Reference) -> ElementTree.Element:
    """What a reader of the file finds."""
    png = to_png(Image.new("RGB", (2, 2)), "about", to_xmp(references))
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.text["imagerag"] == "about"
        found = ElementTree.fromstring(picture.info["xmp"]).find("rdf:RDF/rdf:Description", NAMES)
    assert found is not None
    return found


def reference(number: int, weight: float = 0.5, **values: str) -> Reference:
    about = {"caption": "a mug", "url": f"https://example.org/{number}.png", "source": "shop", "licence": "CC0-1.0"}
    return Reference(id=f"id-{number}", similarity=0.9, weight=weight, **(about | values))


def test_a_picture_says_that_it_is_generated() -> None:
    found = read_back()
    assert found.findtext("ext:DigitalSourceType", namespaces=NAMES) == GENERATED
    assert found.findtext("xmp:CreatorTool", namespaces=NAMES) == "imagerag-turbo"
    assert found.find("xmpMM:Ingredients", NAMES) is None
    assert read_back(reference(1, weight=0)).findtext("ext:DigitalSourceType", namespaces=NAMES) == GENERATED


def test_its_references_are_its_ingredients_whatever_strangers_wrote() -> None:
    hostile = "</rdf:li><x a='1'>&amp;\x00\x1b[31m\ud800 \N{GRINNING FACE}"
    found = read_back(reference(1), reference(2, licence=hostile, source=""), reference(3, weight=0))
    assert found.findtext("ext:DigitalSourceType", namespaces=NAMES) == COMPOSITE
    first, second = found.findall("xmpMM:Ingredients/rdf:Bag/rdf:li", NAMES)
    values = [first.findtext(name, namespaces=NAMES) for name in ("stRef:documentID", "stRef:filePath", "dc:rights")]
    assert values == ["id-1", "https://example.org/1.png", "CC0-1.0"]
    assert first.findtext("dc:source", namespaces=NAMES) == "shop"
    expected = "</rdf:li><x a='1'>&amp;\ufffd\ufffd[31m\ufffd \N{GRINNING FACE}"
    assert second.findtext("dc:rights", namespaces=NAMES) == expected
    assert second.find("dc:source", NAMES) is None
