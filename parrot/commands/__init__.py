"""The subcommands of ``parrot``, one module each: ``add_parser(commands)`` and ``run(args)``."""
