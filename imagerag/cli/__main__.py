"""`python -m imagerag.cli`."""

from imagerag.cli import main

main()
