"""XMP metadata of a picture: that a model generated it, and from which references.

The terms are IPTC's digital source types, and XMP's ingredients for the references.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from imagerag.generation.references import Reference

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
_CREATOR = "imagerag-turbo"
_NAMESPACES = {
    "xmlns:rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmlns:dc": "http://purl.org/dc/elements/1.1/",
    "xmlns:xmp": "http://ns.adobe.com/xap/1.0/",
    "xmlns:xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "xmlns:stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "xmlns:Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML can't have, not even escaped."""


def to_xmp(references: "Iterable[Reference]") -> str:
    """Return the XMP packet of a picture; only references with a weight count, others did not change the picture."""
    fused = [each for each in references if each.weight]
    meta = ElementTree.Element("x:xmpmeta", {"xmlns:x": "adobe:ns:meta/"})
    rdf = ElementTree.SubElement(meta, "rdf:RDF", _NAMESPACES)
    about = ElementTree.SubElement(rdf, "rdf:Description", {"rdf:about": ""})
    _add(about, "xmp:CreatorTool", _CREATOR)
    _add(about, "Iptc4xmpExt:DigitalSourceType", COMPOSITE if fused else GENERATED)
    if fused:
        bag = ElementTree.SubElement(ElementTree.SubElement(about, "xmpMM:Ingredients"), "rdf:Bag")
        for each in fused:
            item = ElementTree.SubElement(bag, "rdf:li", {"rdf:parseType": "Resource"})
            _add(item, "stRef:documentID", each.id)
            _add(item, "stRef:filePath", each.url)
            _add(item, "dc:source", each.source)
            _add(item, "dc:rights", each.licence)
    packet = ElementTree.tostring(meta, encoding="unicode")
    return f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{packet}<?xpacket end="r"?>'


def _add(parent: ElementTree.Element, name: str, text: str) -> None:
    """Add a property, unless its value is empty."""
    if text:
        ElementTree.SubElement(parent, name).text = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
