"""The command `advcl-hub`: reads the command line, calls the library, prints."""

import click

from advcl_hub.cli import hub, measure, tune
from advcl_hub.cli.common import any_text


class _InOrder(click.Group):
    """Commands in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="advcl-hub")
def main() -> None:
    """Image encoders for timm that stay adversarially robust after finetuning.

    \b
    Completion of commands, options and names (bash; zsh and fish likewise):
      eval "$(_ADVCL_HUB_COMPLETE=bash_source advcl-hub)"
    """
    any_text()


for _command in (
    *(hub.list_command, hub.info_command, hub.pull_command, hub.verify_command),
    *(tune.finetune, tune.lp_aff, tune.presets, measure.evaluate, measure.report_command, tune.transfer),
    *(hub.card_command, hub.push_command, hub.convert_command),
):
    main.add_command(_command)
