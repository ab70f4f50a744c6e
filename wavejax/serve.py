"""Serves a model by an OpenAI-compatible API: `python -m wavejax.serve --help`."""

from wavejax.cli.interrupts import interrupts_end_the_process

if __name__ == "__main__":
    interrupts_end_the_process()  # before anything that takes long to import

from wavejax.cli.entry import entry

main, run = entry("wavejax.cli.serve_command")

if __name__ == "__main__":
    run()
