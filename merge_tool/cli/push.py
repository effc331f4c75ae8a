"""The command that publishes an output on the Hub, or in a bucket."""

from __future__ import annotations

from pathlib import Path

import click

from merge_tool.cli.frame import CONTINUES, print_errors


@click.command("push", context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("target", metavar="hub:ORG/NAME|s3://...")
@click.option("--private", is_flag=True, help="If the repository is not there: make it a private one.")
@click.option("--no-publish", is_flag=True, help="Leave the pull request open.")
@click.option("--overwrite", is_flag=True, help="Replace the model that the repository has.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@print_errors(CONTINUES)
def push_command(out: Path, target: str, no_publish: bool, quiet: bool, **options: bool) -> None:
    """Push the output OUT of a merge to the Hub's repository ORG/NAME, which shows all of it at once, or to a bucket.

    On the Hub everything goes to a pull request, which is merged last; to s3://BUCKET/FOLDER (gs://, az://) what makes
    it a model comes last. A push that was stopped continues with the same command, also on another machine.
    """
    from merge_tool.cli.show import push_lines
    from merge_tool.output.upload import push

    pushed = push(out, target, publish=not no_publish, **options)
    if not quiet:
        click.echo("\n".join(push_lines(pushed)))
