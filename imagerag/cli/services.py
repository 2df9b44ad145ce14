"""`imagerag up` and `imagerag down`: the Prefect server and worker of this home."""

from pathlib import Path

import typer


def up() -> None:
    """Start the Prefect server and a worker for this home, and deploy all flows."""
    import flows
    from imagerag import services
    from imagerag.settings import Settings

    assert flows.__file__ is not None
    settings = Settings()
    typer.echo(f"Starting Prefect for {settings.home} (about half a minute the first time).")
    server, worker = services.up(settings.home, project=Path(flows.__file__).parent.parent)
    typer.echo(f"Prefect UI  {server.url}")
    typer.echo(f"worker      process {worker.pid}, work pool {services.WORK_POOL}")
    typer.echo(f"logs        {settings.home / 'logs'}")


def down() -> None:
    """Stop what `imagerag up` started."""
    from imagerag import services
    from imagerag.settings import Settings

    stopped = services.down(Settings().home)
    typer.echo("Stopped " + ", ".join(service.name for service in stopped) if stopped else "Nothing was running.")
