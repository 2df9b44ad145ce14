from tests.generation.conftest import bases as bases
