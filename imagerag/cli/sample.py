"""`imagerag sample`: the sample corpus that ships with the package."""

from typing import Annotated

import typer

app = typer.Typer(help="The sample corpus: emoji drawings in several styles.", no_args_is_help=True)


@app.command()
def serve(
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on loopback. Default: the same one for each run of this home."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of good images in the list.")] = None,
) -> None:
    """Serve the sample corpus over HTTP on loopback, including URLs that must fail, until Ctrl-C."""
    import signal

    from imagerag.embedded.sample.server import HOST, SampleServer, remembered_port, write_held_out, write_url_list
    from imagerag.settings import Settings

    home = Settings().home
    with SampleServer(remembered_port(home) if port is None else port) as server:
        url_list = write_url_list(server, home, limit)
        typer.echo(f"serving   {server.url}")
        typer.echo(f"URL list  {url_list}")
        typer.echo(f"held out  {write_held_out(home)}")
        typer.echo(f"ingest    imagerag ingest {url_list} --name sample --allow-host {HOST}")
        try:
            typer.echo("Press Ctrl-C to stop.")
            signal.pause()
        except KeyboardInterrupt:
            typer.echo("")
