"""``python -m wavejax.convert SOURCE DESTINATION``: a model as a folder that opens fast.

The new folder holds Orbax parameters in the dtype asked for, the model's config and its tokenizer.
"""

from wavejax.cli.interrupts import interrupts_end_the_process

if __name__ == "__main__":
    interrupts_end_the_process()  # before anything that takes long to import

from wavejax.cli.entry import entry

main, run = entry("wavejax.cli.convert_command")

if __name__ == "__main__":
    run()
