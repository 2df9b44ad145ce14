"""Features of pictures by the metrics' networks, computed on Ray and cached in a table for each network and source.

Drivers and metrics then hold features instead of decoded pictures, those of one way at a time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.evaluation.config import EvaluateConfig, MetricFiles
from imagerag.evaluation.networks import Network, NetworkName, load_network, networks_of
from imagerag.evaluation.recognition import Floats
from imagerag.hspace.encode import open_images
from imagerag.progress import OnProgress
from imagerag.settings import Settings
from imagerag.storage.keyed_table import KeyedTable
from imagerag.storage.lance_table import LanceTable, rows_with
from imagerag.workers import Dtype, Job, run_job

FEATURES = "features"
"""Kind of the tables, by which a takedown finds them."""
_VERSION = 1
"""Version of the networks' code; a change makes new tables."""
_ROWS_OF_A_TASK = 128
_COLUMNS = (pa.field("values", pa.list_(pa.float32())),)

_Key = tuple[str, NetworkName]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures of a table with the columns `id` and `image`. A row's image must never change."""

    table: LanceTable
    rows: pa.Table
    """`id` and `prompt` of the pictures (N,)."""
    version: int | None = None
    """Version of the table, by default the newest."""
    unused: tuple[NetworkName, ...] = ()
    """Networks whose features of these pictures no metric reads."""


class FeatureJob:
    """Computes the features of all sources' pictures by all networks."""

    def __init__(self, sources: Mapping[str, Source], config: EvaluateConfig, folder: str) -> None:
        """Initialise the job.

        Args:
            sources: pictures by name.
            config: files of the networks, and workers.
            folder: URI of the folder with the tables of features.

        Raises:
            UserError: if a file of a network does not exist.
        """
        self._sources, self._config = dict(sources), config
        self._tables: dict[_Key, KeyedTable] = {}
        networks = networks_of(config.files)
        for name, source in self._sources.items():
            for network in sorted(networks.keys() - set(source.unused)):
                digests = networks[network]
                key = {"of": source.table.name, "network": network, "files": digests, "version": _VERSION}
                self._tables[name, network] = KeyedTable.of(folder, FEATURES, key, _COLUMNS)

    def run(self, settings: Settings, on_progress: OnProgress) -> None:
        """Compute the missing features. Progress counts pictures, once for each network."""
        distinct = {table.name: key for key, table in self._tables.items()}  # sources that are the same have one table
        versions = {key: self._tables[key].version for key in distinct.values()}
        missing = {key: self._missing(*key) for key in distinct.values()}
        total = sum(rows.num_rows for rows in missing.values())
        if not total:
            return
        parts = []
        for (name, network), rows in missing.items():
            if rows.num_rows:
                self._tables[name, network].clean_up()
            for start in range(0, rows.num_rows, _ROWS_OF_A_TASK):
                part = rows.slice(start, _ROWS_OF_A_TASK)
                part = part.append_column("source", pa.array([name] * part.num_rows))
                parts.append(part.append_column("network", pa.array([network] * part.num_rows)))

        def commit(results: list[str]) -> None:
            for result in map(json.loads, results):
                key = result["source"], result["network"]
                versions[key] = self._tables[key].commit(result["fragments"], versions[key])

        arguments = {
            "datasets": {name: (source.table, source.version) for name, source in self._sources.items()},
            "tables": self._tables,
            "files": self._config.files,
        }

        def report(done: int) -> None:
            on_progress(done, total, "features of pictures")

        job = Job(parts=parts, worker=Worker, arguments=arguments, num_rows=total, commit=commit, on_done=report)
        run_job(job, self._config, settings)

    def read(self, name: str, network: NetworkName) -> Floats:
        """Return the features (N, D) of a source's pictures by a network."""
        wanted = self._sources[name].rows["id"]
        if not len(wanted):
            return np.empty((0, 1), np.float32)
        rows = self._tables[name, network].dataset().to_table(columns=["id", "values"])
        values = rows["values"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        order = pc.index_in(wanted, value_set=rows["id"]).to_numpy()
        features: Floats = values[order]
        return features

    def _missing(self, name: str, network: NetworkName) -> pa.Table:
        rows = self._sources[name].rows
        return rows.filter(pc.invert(pc.is_in(rows["id"], self._tables[name, network].ids())))


class Worker:
    """Computes features and writes them as fragments; networks are loaded on first use, in fp32 whatever `dtype` is."""

    def __init__(
        self,
        *,
        datasets: Mapping[str, tuple[LanceTable, int | None]],
        tables: Mapping[_Key, KeyedTable],
        files: MetricFiles,
        device: str,
        dtype: Dtype | None,
    ) -> None:
        self._datasets, self._tables, self._files, self._device = datasets, tables, files, device
        self._networks: dict[NetworkName, Network] = {}

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        """Return the table with its `fragments`, as JSON, and the number of pictures."""
        name, network = (rows[column][0].as_py() for column in ("source", "network"))
        table, version = self._datasets[name]
        found = rows_with(table.dataset(version), "id", rows["id"], ["id", "image"])
        images = found["image"].take(pc.index_in(rows["id"], value_set=found["id"])).to_pylist()
        features = self._load(network)(open_images(images), rows["prompt"].to_pylist()).astype(np.float32)
        written = pa.table({"id": rows["id"], "values": _lists(features)})
        fragments = self._tables[name, network].write_fragments(written)
        return [json.dumps({"source": name, "network": network, "fragments": fragments})], rows.num_rows

    def _load(self, network: NetworkName) -> Network:
        if network not in self._networks:
            self._networks[network] = load_network(network, self._files, self._device)
        return self._networks[network]


def _lists(values: Floats) -> pa.ListArray:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, values.reshape(-1))
