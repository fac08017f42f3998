"""Command `status`, which shows the model of a running server."""

from serving.cli.console import Json, document, result, table
from serving.cli.documents import Status
from serving.cli.options import Connection, connects_to_server


@connects_to_server
def status(as_json: Json = False, *, connection: Connection) -> None:
    """Show which model a running server serves."""
    with connection.client() as client:
        found = Status(url=str(connection.url), facts=client.facts)
    if as_json:
        document(found)
        return
    result(table(found.url, ("", ""), sorted(found.facts.items())))
