"""``dist-prune completion``: a script that completes verbs, options, and the names of recipes in a shell."""

import argparse

from dist_prune.cli.verb import Answer
from dist_prune.config.recipe_files import SWEEPS, known_recipes

BASH = """# dist-prune completion for bash; for zsh: autoload -U +X bashcompinit && bashcompinit, then this
_dist_prune() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word"))
    return
  fi
  case "$verb" in
{cases}
  esac
  COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _dist_prune dist-prune
"""
FISH = """# dist-prune completion for fish
complete -c dist-prune -n __fish_use_subcommand -f -a "{verbs}"
{cases}
"""
RECIPE_VERBS = ("check", "run", "score-many", "ratio-curves")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")


def run(arguments: argparse.Namespace) -> Answer:
    """Print the script.

    Written to a file that the shell reads it costs nothing; made at each start of a shell it costs the import of every
    verb. For bash: ``dist-prune completion bash > ~/.dist-prune-completion``, and source that file in ~/.bashrc.
    """
    text = script(arguments.shell)
    return text, {"shell": arguments.shell, "script": text}, 0


def script(shell: str) -> str:
    """The script of a shell; recipes are those that are known where and when it is made."""
    from dist_prune.cli.main import VERBS, build_parser

    recipes = {verb: " ".join(sorted(known_recipes())) for verb in RECIPE_VERBS}
    recipes["sweep"] = " ".join(sorted(known_recipes(SWEEPS)))
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    cases = []
    for verb in VERBS:
        options = " ".join(
            option for action in parsers[verb]._actions for option in action.option_strings if option.startswith("--")
        )
        names = recipes.get(verb, "")
        if shell == "fish":
            rule = f'complete -c dist-prune -n "__fish_seen_subcommand_from {verb}"'
            cases += [f"{rule} -l {option[2:]}" for option in options.split()]
            cases += [f'{rule} -a "{names}"'] if names else []
        else:
            words = f"{names} {options}".strip()
            cases.append(f'    {verb}) COMPREPLY=($(compgen -W "{words}" -- "$word"));;')
    template = FISH if shell == "fish" else BASH
    return template.format(verbs=" ".join(VERBS), cases="\n".join(cases)).rstrip()
