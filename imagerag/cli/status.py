"""`imagerag status`: a corpus at a glance."""

import os

from imagerag.cli.names import NameOption, corpus_name


def status(name: NameOption = None) -> None:
    """Show what is published of a corpus, its features and failures, its champion, the last runs and the next one.

    In Prefect's UI it is the artifact `status-<name>`, which every flow brings up to date as it ends.
    """
    from rich.markdown import Markdown

    from imagerag.cli.project import project
    from imagerag.cli.terminal import PlainConsole
    from imagerag.services import prefect_api, prefect_environment
    from imagerag.settings import Settings

    settings, name = Settings(), corpus_name(name)
    api_url = prefect_api(settings)
    # Prefect reads its settings when it is first imported.
    os.environ.update(prefect_environment(settings, api_url))
    project()  # which makes sure that `tasks` is ours
    from prefect.client.orchestration import get_client

    from tasks.dashboard import collect

    if api_url is None:
        dashboard = collect(settings, name, None)
    else:
        with get_client(sync_client=True) as client:
            dashboard = collect(settings, name, client)
    PlainConsole().print(Markdown(dashboard.markdown()))
