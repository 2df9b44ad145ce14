"""`imagerag up` and `imagerag down`: start and stop the servers and the worker of a home."""

import typer


def up() -> None:
    """Start the Prefect and MLflow servers and a worker for this home, and deploy all flows."""
    from imagerag import credentials, services
    from imagerag.cli.deploy import nightly_parameters
    from imagerag.cli.project import project
    from imagerag.settings import Settings

    settings, folder = Settings(), project()
    nightly_parameters(settings)
    typer.echo(f"Starting Prefect and MLflow for {settings.home} (about half a minute the first time).")
    started = {each.name: each for each in services.up(settings, project=folder)}
    mlflow = started.get(services.MLFLOW)
    prefect = started.get(services.PREFECT)
    typer.echo(f"Prefect UI  {settings.prefect_api_url if prefect is None else services.link(prefect, settings.home)}")
    typer.echo(f"MLflow UI   {settings.mlflow_tracking_uri if mlflow is None else mlflow.url}")
    if mlflow is not None:
        # Not as part of the URL: browsers then refuse the page's own requests.
        password = credentials.password(settings.home)
        typer.echo(f"            user {credentials.USER}, password {password}")
        typer.echo(
            f"            export MLFLOW_TRACKING_URI={mlflow.url} MLFLOW_TRACKING_USERNAME={credentials.USER} "
            f"MLFLOW_TRACKING_PASSWORD={password}"
        )
    typer.echo(f"worker      process {started[services.WORKER].pid}, work pool {services.WORK_POOL}")
    typer.echo(f"logs        {settings.home / 'logs'}")


def down() -> None:
    """Stop the services that `imagerag up` started."""
    from imagerag import services
    from imagerag.settings import Settings

    stopped = services.down(Settings().home)
    typer.echo("Stopped " + ", ".join(service.name for service in stopped) if stopped else "Nothing was running.")
