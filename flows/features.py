"""The flow `features`: compute a base model's features of every row once, and publish them with the index."""

from flows.ingest import check_published
from flows.parameters import FeaturesParameters
from tasks.features import make_features
from tasks.index import index_rows
from tasks.parameters import flow_of
from tasks.policy import alone_at
from tasks.publish import check_champion, publish_index
from tasks.report import FeaturesReport, write_features_report
from tasks.slots import compute_slot


@flow_of(FeaturesParameters)
def features(parameters: FeaturesParameters) -> FeaturesReport:
    """Compute the cached features of an index for a base model, and publish them.

    A second run encodes only rows without features.
    """
    with compute_slot(), alone_at(parameters.name):
        cached = make_features(parameters.name, parameters.features)
        index = index_rows(cached, parameters.index)
        publication = publish_index(index, parameters.publish)
    report = FeaturesReport(name=parameters.name, cached=cached, publication=publication)
    write_features_report(report)
    check_published(parameters.name, publication)
    check_champion(cached, publication)
    return report
