"""What may be typed at the terminal besides prompts: how answers are chosen, shown and changed."""

from __future__ import annotations

from neox.config import NeoXConfig, change, parse_set
from neox.errors import ConfigError

SETTINGS = ("temperature", "top_k", "top_p", "maximum_tokens", "seed")
HELP = f"""\
:set             show {", ".join(SETTINGS)}
:set NAME VALUE  change one of them for what follows
:quit            end, as Ctrl-D does
A prompt that begins with a colon is typed with a backslash in front of it."""


class Session:
    """What is set now.

    index: of the next prompt, for its random stream. Setting the seed begins the count again, so
    the same prompts after it get the same answers.
    """

    def __init__(self, config: NeoXConfig) -> None:
        self.config = config
        self.index = 0

    def command(self, text: str) -> str:
        """Do what `text`, which begins with a colon, says; return the reply.

        Raises ConfigError for what is no command, and as the configuration does for values.
        """
        match text.replace("=", " ", 1).split(maxsplit=2):
            case [":help"]:
                return HELP
            case [":set"]:
                return "\n".join(self._shown(name) for name in SETTINGS)
            case [":set", name, value] if name in SETTINGS:
                self.config = change(self.config, name, parse_set(f"{name}={value}")[1])
                if name == "seed":
                    self.index = 0
                return self._shown(name)
            case [":set", *_]:
                raise ConfigError(f"write :set NAME VALUE, NAME one of {', '.join(SETTINGS)}")
        raise ConfigError(f"{text.split()[0]} is no command; :help lists them, and \\: begins text")

    def _shown(self, name: str) -> str:
        return f"{name} {getattr(self.config, name)}"
