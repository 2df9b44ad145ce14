"""`imagerag status`: show the status of a corpus."""

import os

from imagerag.cli.names import NameOption, corpus_name


def status(name: NameOption = None) -> None:
    """Show a corpus's published index, features, failures and champion, the last runs and the next scheduled run.

    Prefect's UI shows the same as the artifact `status-<name>`, which every flow updates when it ends.
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
    project()  # checks that `tasks` is this project's package
    from prefect.client.orchestration import get_client

    from tasks.dashboard import collect

    if api_url is None:
        dashboard = collect(settings, name, None)
    else:
        with get_client(sync_client=True) as client:
            dashboard = collect(settings, name, client)
    PlainConsole().print(Markdown(dashboard.markdown()))
